"""Ranks find their places, and what all of them hold makes up the model: many ranks, played by one process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from factories import random_tokens, tiny_model
from megalodon.parallel.layout import Layout
from megalodon.parallel.mesh import Mesh
from megalodon.parallel.several import SeveralRanks

layout, some, step = Layout(**json.loads(sys.argv[1])), json.loads(sys.argv[2]), json.loads(sys.argv[3])


held, coordinates = {}, []
for rank in some:
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    ranks = SeveralRanks(Mesh(layout, "cpu"))
    coordinates.append([ranks.mesh.data_rank, ranks.mesh.cp_rank, ranks.mesh.tp_rank])
    model = tiny_model(torch.float32, value_dim=44, ffn_hidden_dim=30, swiglu=True)
    ranks.wrap(model, bf16=False)
    parameters = ranks.parameters(model)
    for name, part in parameters.items():
        offsets, whole = ranks.place(name, part)
        count = held.setdefault(name, torch.zeros(whole, dtype=torch.int64))
        count[tuple(slice(a, a + n) for a, n in zip(offsets, part.shape))] += 1
    if step:
        hidden, _ = model.hidden(**ranks.piece(model, random_tokens(1, 10 * layout.cp), None))
        (hidden @ model.output_weight.T).sum().backward()
        gradients = ranks.gradients(model, parameters)
        assert {n: g.shape for n, g in gradients.items()} == {n: p.shape for n, p in parameters.items()}
    copies = {name: ranks.copies(name) for name in parameters}
    dist.destroy_process_group()
spans = {name: [int(count.min()), int(count.max())] for name, count in held.items()}
print(json.dumps([coordinates, copies, spans]))
"""


def played(layout: dict[str, int], some: list[int], step: bool) -> Any:
    tests = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r})\n{SCRIPT}"
    command = [sys.executable, "-c", code, json.dumps(layout), json.dumps(some), json.dumps(step)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_parts_of_all_ranks_are_the_model() -> None:
    """Every value of every parameter is held as often as `copies` says; some ranks hold nothing of a short one."""
    coordinates, copies, held = played({"dp_shard": 16}, list(range(16)), False)
    assert coordinates == [[rank, 0, 0] for rank in range(16)]
    assert held == {name: [count, count] for name, count in copies.items()}


def test_a_pass_among_256_ranks() -> None:
    layout = {"dp_replicate": 2, "dp_shard": 16, "cp": 4, "tp": 2}
    coordinates, copies, _ = played(layout, [253], True)
    assert coordinates == [[31, 2, 1]]
    assert copies["layers.0.mega.wv.weight"] == 2 and copies["layers.0.mega.cema.alpha"] == 128
    assert copies["layers.0.mega.rmsnorm.weight"] == 256 and copies["embed.weight"] == 2
