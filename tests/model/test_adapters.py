"""Adapters change nothing at first, learn alone, merge exactly, and are files that every user of peft can read."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import random_starts, random_tokens, tiny_config, tiny_model

from megalodon.checkpoint.adapter_files import load_adapter, read_adapter_info, save_adapter
from megalodon.checkpoint.tensors import load_model, read_model_info, save_model
from megalodon.errors import CheckFailed, CheckpointError, EnvironmentFault, InputError
from megalodon.interop.conversion import Options, convert
from megalodon.interop.sources import open_source
from megalodon.model.adapters import (
    TARGETS,
    LoraConfig,
    adapter_tensors,
    inject,
    is_adapted,
    merged,
    num_adapter_parameters,
    set_adapter_tensors,
    trainable,
)
from megalodon.model.decoder import Decoder
from megalodon.model.megalodon import Megalodon

KINDS: list[dict[str, Any]] = [{}, {"dora": True}, {"rslora": True, "targets": ("wz", "fc1", "fc2")}]


def adapted(dtype: torch.dtype = torch.float64, *, swiglu: bool = True, **changes: Any) -> Megalodon:
    """A model whose adapters are all random: that they start at zero must hide nothing."""
    model = tiny_model(dtype, swiglu=swiglu, share_emb=True)
    inject(model, LoraConfig(**({"r": 3} | changes)), seed=1)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(dtype)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_nothing_and_are_the_only_thing_that_learns(kind: dict[str, Any]) -> None:
    model, tokens = tiny_model(swiglu=True), random_tokens(2, 31)
    before = model(tokens)[0]
    state = torch.random.get_rng_state()
    inject(model, LoraConfig(r=3, **kind), seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(model(tokens)[0], before, rtol=0, atol=0 if not kind.get("dora") else 1e-12)
    names = trainable(model)
    assert names and all(".lora_" in name for name in names)
    assert sum(p.numel() for p in names.values()) == num_adapter_parameters(model.config, LoraConfig(r=3, **kind))
    wanted = kind.get("targets", TARGETS)
    assert {name.split(".")[3] for name in names} == set(wanted)
    again = tiny_model(swiglu=True)
    inject(again, LoraConfig(r=3, **kind), seed=1)
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in names.items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_adapters_are_right_and_the_base_has_none(kind: dict[str, Any]) -> None:
    model, tokens, starts = adapted(**kind), random_tokens(2, 23), random_starts(2, 23)

    def loss() -> torch.Tensor:
        return model(tokens, starts=starts)[0].square().mean()

    loss().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
    for name, parameter in list(trainable(model).items())[::5]:
        assert parameter.grad is not None
        flat, step = parameter.data.view(-1), 1e-5
        place = int(parameter.grad.abs().argmax())
        value = float(flat[place])
        sides = []
        for change in (step, -step):
            flat[place] = value + change
            sides.append(float(loss().detach()))
        flat[place] = value
        found = float(parameter.grad.view(-1)[place])
        if not kind.get("dora"):  # DoRA takes its norm for a constant, so its gradient is another on purpose
            assert abs((sides[0] - sides[1]) / (2 * step) - found) <= 1e-5 * abs(found) + 1e-8, name


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_adapted_model_also_in_the_decoder(kind: dict[str, Any]) -> None:
    model, tokens = adapted(**kind).eval(), random_tokens(1, 31)
    plain = merged(model)
    assert not is_adapted(plain) and is_adapted(model) and plain.config == model.config
    expected = model(tokens)[0]
    torch.testing.assert_close(plain(tokens)[0], expected, rtol=0, atol=1e-12)
    assert (plain(tokens)[0] - tiny_model(swiglu=True, share_emb=True)(tokens)[0]).abs().max() > 0.1
    decoder = Decoder(plain)
    steps = torch.stack([decoder.step(tokens[:, i]) for i in range(31)], dim=1)
    torch.testing.assert_close(steps, expected, rtol=0, atol=1e-10)
    assert plain.embed.weight.data_ptr() == model.embed.weight.data_ptr(), "what has no adapter is shared"
    assert plain.output.output.weight is plain.embed.weight
    assert merged(plain) is plain


def test_what_is_no_matrix_of_the_model_gets_no_adapter() -> None:
    with pytest.raises(ValueError, match="`output` is not one of wz, wv"):
        LoraConfig(targets=("output",))
    with pytest.raises(ValueError, match=r"`\[\]` is not one of"):
        LoraConfig(targets=())
    with pytest.raises(InputError, match="this model has no fc3; its matrices: fc1, fc2, wh1"):
        inject(tiny_model(), LoraConfig(targets=("fc3",)), 1)
    model = adapted()
    with pytest.raises(InputError, match="has adapters already"):
        inject(model, LoraConfig(), 1)
    plain = tiny_model()
    inject(plain, LoraConfig(), 1)
    assert {name.split(".")[3] for name in trainable(plain)} == set(TARGETS) - {"fc3"}


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentFault, match=r"model\.lora \(adapters\) needs the extra \[finetune\]: pip install 'mega"
    ):
        inject(tiny_model(), LoraConfig(), 1)


def test_importing_the_module_imports_no_peft() -> None:
    import subprocess

    code = "import sys, megalodon.model.adapters, megalodon.checkpoint.adapter_files, megalodon.recipe; "
    code += "print('peft' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def base_directory(place: Path, seed: int = 0) -> Path:
    save_model(tiny_model(torch.float32, seed, swiglu=True, share_emb=True), place, None, {"bos": True})
    return place


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    base_directory(tmp_path / "base")
    model = adapted(torch.float32)
    save_adapter(model, tmp_path / "run/adapter", tmp_path / "base", lambda d: None, {"step": 9, "bos": True})
    return tmp_path / "run/adapter"


def test_a_saved_adapter_gives_back_its_model(saved: Path, tmp_path: Path) -> None:
    tokens, expected = random_tokens(2, 31), merged(adapted(torch.float32))
    assert torch.equal(load_adapter(saved)(tokens)[0], expected(tokens)[0])
    assert read_adapter_info(saved)["base"]["path"] == "../../base"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert torch.equal(load_adapter(tmp_path / "moved/adapter")(tokens)[0], expected(tokens)[0])
    with open_source(tmp_path / "moved/adapter") as source:
        done = convert(source, tmp_path / "whole", Options())
    assert torch.equal(load_model(tmp_path / "whole")(tokens)[0], expected(tokens)[0])
    assert read_model_info(tmp_path / "whole")["merged_from"].keys() == {"base", "adapter"}
    assert done.remarks[-1].startswith("base and adapter: largest logit difference"), "merged = beside"


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_a_merge_that_is_another_function_is_refused(
    saved: Path, tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(model: Megalodon) -> Megalodon:
        plain = merged(model)
        plain.get_parameter("layers.1.nffn.fc1.weight").data *= 1.001
        return plain

    monkeypatch.setattr("megalodon.interop.sources.merged", halved)
    with (
        open_source(saved) as source,
        pytest.raises(CheckFailed, match="parity: base and adapter: largest logit difference"),
    ):
        convert(source, tmp_path / "whole", Options(dtype=dtype))
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_write(tmp_path: Path, kind: dict[str, Any]) -> None:
    import peft

    base_directory(tmp_path / "base")
    model = adapted(torch.float32, **kind)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base", None, {})
    theirs = peft.PeftModel.from_pretrained(load_model(tmp_path / "base"), str(tmp_path / "adapter"))
    tokens = random_tokens(2, 31)
    assert torch.equal(theirs(tokens)[0], model.eval()(tokens)[0])


def test_the_adapter_of_another_base_is_refused_with_both_hashes(saved: Path, tmp_path: Path) -> None:
    own = read_adapter_info(saved)["base"]["weights_sha256"][:8]
    other = base_directory(tmp_path / "other", seed=5)
    found = read_model_info(other)["weights_sha256"][:8]
    with pytest.raises(CheckpointError, match=f"belongs to weights {own}, but .*other has {found}"):
        load_adapter(saved, other)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"its base .*base is not there; .*--base DIR"):
        load_adapter(saved)
    load_adapter(saved, tmp_path / "elsewhere")


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"bias": "all"}, "bias is 'all', which this version cannot honour"),
        ({"modules_to_save": ["embed"]}, "modules_to_save is"),
        ({"auto_mapping": {"parent_library": "evil"}}, "auto_mapping is"),
        ({"target_modules": ["output"]}, "`output` is not one of"),
        ({"r": 0}, "greater than or equal to 1"),
        ({"r": 5}, r"is \(3, \d+\), but adapter_config.json says r 5"),
        ({"lora_alpha": 64}, "adapter_config.json has"),
    ],
)
def test_a_changed_configuration_is_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    change_config(saved, **changes)
    if "lora_alpha" not in changes:  # let only the check in question speak
        info = json.loads((saved / "megalodon.json").read_text())
        info["files"].pop("adapter_config.json")
        (saved / "megalodon.json").write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(saved)


def test_damaged_and_missing_files_are_one_line(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has"):
        load_adapter(saved)
    weights.unlink()
    (saved / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"an adapter_model\.bin is not read: it is a pickle"):
        load_adapter(saved)
    weights.write_bytes(raw)
    (saved / "megalodon.json").unlink()
    with pytest.raises(CheckpointError, match="the base of this adapter is not known"):
        load_adapter(saved)
    (saved / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="is not an adapter directory"):
        load_adapter(saved)


def test_tensors_of_another_model_are_listed() -> None:
    model, other = adapted(), adapted(swiglu=False)
    with pytest.raises(CheckpointError, match=r"x: 4 tensors do not fit .* missing .*fc3"):
        set_adapter_tensors(model, adapter_tensors(other), "x")
    tensors = {name: t[:1] for name, t in adapter_tensors(model).items()}
    with pytest.raises(CheckpointError, match=r"\(1, 24\), expected \(3, 24\)"):
        set_adapter_tensors(model, tensors, "x")


def test_linear_maps_draw_nothing_when_they_are_made() -> None:
    state = torch.random.get_rng_state()
    Megalodon(tiny_config())
    assert torch.equal(torch.random.get_rng_state(), state)
