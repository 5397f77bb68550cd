"""What an export for transformers carries as code: copied into it as it is, never imported by this package.

Each file needs torch and transformers alone; they import each other relatively, as transformers expects it.
"""
