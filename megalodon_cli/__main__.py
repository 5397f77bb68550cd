"""`python -m megalodon_cli`: the command line. Not here: anything else."""

from megalodon_cli.app import main

main()
