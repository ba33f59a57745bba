from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.fragments import FragmentSpec, TensorSpec, default_chunk_values, gather, plan_fragments, scatter


def llama_specs(num_layers: int) -> list[TensorSpec]:
    specs = [TensorSpec(name="model.embed_tokens.weight", shape=(11, 6))]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        specs.append(TensorSpec(name=f"{prefix}.self_attn.q_proj.weight", shape=(6, 6)))
        specs.append(TensorSpec(name=f"{prefix}.mlp.up_proj.weight", shape=(9, 6)))
        specs.append(TensorSpec(name=f"{prefix}.input_layernorm.weight", shape=(6,)))
    return [*specs, TensorSpec(name="model.norm.weight", shape=(6,)), TensorSpec(name="lm_head.weight", shape=(11, 6))]


def layers_of(fragment: FragmentSpec) -> list[int]:
    return sorted({int(t.name.split(".")[2]) for t in fragment.tensors if t.name.startswith("model.layers.")})


@given(
    num_layers=st.integers(1, 12),
    data=st.data(),
    pattern=st.sampled_from(["sequential", "strided"]),
    chunk_values=st.one_of(st.none(), st.integers(1, 500)),
)
@settings(max_examples=60, deadline=None)
def test_every_tensor_is_in_exactly_one_fragment_in_the_given_order(
    num_layers: int, data: st.DataObject, pattern: str, chunk_values: int | None
) -> None:
    num_fragments = data.draw(st.integers(1, num_layers))
    specs = llama_specs(num_layers)
    fragments = plan_fragments(specs, num_fragments=num_fragments, pattern=pattern, chunk_values=chunk_values)
    assert [f.index for f in fragments] == list(range(num_fragments))
    dealt = [tensor for fragment in fragments for tensor in fragment.tensors]
    assert sorted(t.name for t in dealt) == sorted(t.name for t in specs)
    place = {tensor.name: number for number, tensor in enumerate(specs)}
    for fragment in fragments:
        order = [place[tensor.name] for tensor in fragment.tensors]
        assert order == sorted(order)
        assert layers_of(fragment), "a fragment without a layer"
        covered = [
            value for i in range(fragment.num_chunks) for value in range(*fragment.chunk_slice(i).indices(10**9))
        ]
        assert covered == list(range(fragment.numel))
    assert fragments[0].tensors[0].name == "model.embed_tokens.weight"
    assert [t.name for t in fragments[-1].tensors[-2:]] == ["model.norm.weight", "lm_head.weight"]


def test_patterns_deal_whole_layers() -> None:
    strided = plan_fragments(llama_specs(7), num_fragments=3, pattern="strided")
    assert [layers_of(f) for f in strided] == [[0, 3, 6], [1, 4], [2, 5]]
    sequential = plan_fragments(llama_specs(7), num_fragments=3, pattern="sequential")
    assert [layers_of(f) for f in sequential] == [[0, 1, 2], [3, 4], [5, 6]]


def test_layers_of_two_stacks_are_told_apart() -> None:
    names = [f"{stack}.layers.{i}.weight" for stack in ("encoder", "decoder") for i in range(2)]
    fragments = plan_fragments([TensorSpec(name=n, shape=(2,)) for n in names], num_fragments=4, pattern="sequential")
    assert [[t.name for t in f.tensors] for f in fragments] == [[n] for n in names]


def test_modules_stand_in_for_layers_in_a_model_without_numbers() -> None:
    names = ["conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias", "scale"]
    fragments = plan_fragments([TensorSpec(name=n, shape=(2,)) for n in names], num_fragments=3, pattern="strided")
    assert [[t.name for t in f.tensors] for f in fragments] == [names[:2], names[2:4], names[4:]]


def test_too_many_fragments_name_setting_value_and_remedy() -> None:
    with pytest.raises(ValueError, match=r"strategy\.num_fragments = 3.*2 layers.*set it to 2 or less"):
        plan_fragments(llama_specs(2), num_fragments=3, pattern="strided")
    with pytest.raises(ValueError, match="num_fragments = 0"):
        plan_fragments(llama_specs(2), num_fragments=0, pattern="strided")
    with pytest.raises(ValueError, match="more than once: a"):
        plan_fragments([TensorSpec(name="a", shape=(1,))] * 2, num_fragments=1, pattern="strided")


@given(numel=st.integers(0, 10**10), block=st.integers(1, 1 << 20))
@settings(max_examples=200, deadline=None)
def test_default_chunks_are_whole_blocks_of_bounded_size(numel: int, block: int) -> None:
    chunk = default_chunk_values(numel, block)
    assert chunk % block == 0
    assert 4096 <= chunk
    assert chunk <= max(262_144, block)
    if block <= 4096 and 65_536 <= numel <= 4_000_000:
        assert 8 <= -(-numel // chunk) <= 16


def tensors_for(specs: list[TensorSpec]) -> dict[str, Tensor]:
    first, made = 0, {}
    for spec in specs:
        made[spec.name] = torch.arange(first, first + spec.numel, dtype=torch.float32).reshape(spec.shape)
        first += spec.numel
    return made


@given(data=st.data(), num_fragments=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_scatter_is_the_inverse_of_gather_for_any_range(data: st.DataObject, num_fragments: int) -> None:
    specs = [*llama_specs(3), TensorSpec(name="scalar", shape=()), TensorSpec(name="empty", shape=(0, 4))]
    tensors = tensors_for(specs)
    for spec in plan_fragments(specs, num_fragments=num_fragments, pattern="strided", chunk_values=64):
        whole = gather(spec, tensors)
        assert torch.equal(whole, torch.cat([tensors[t.name].reshape(-1) for t in spec.tensors]))
        start = data.draw(st.integers(0, spec.numel))
        values = slice(start, data.draw(st.integers(start, spec.numel)))
        assert torch.equal(gather(spec, tensors, values=values), whole[values])
        copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        scatter(spec, whole[values], copies, values=values)
        expected = torch.zeros_like(whole)
        expected[values] = whole[values]
        assert torch.equal(gather(spec, copies), expected)


def test_gather_reads_parameters_and_scatter_writes_them() -> None:
    model = torch.nn.Linear(3, 2)
    specs = [TensorSpec(name=n, shape=tuple(p.shape)) for n, p in model.named_parameters()]
    (spec,) = plan_fragments(specs, num_fragments=1, pattern="strided")
    parameters = dict(model.named_parameters())
    flat = gather(spec, parameters, torch.empty(8))
    assert not flat.requires_grad
    scatter(spec, flat + 1, parameters)
    assert torch.equal(gather(spec, parameters), flat + 1)


def test_wrong_tensors_are_named() -> None:
    (spec,) = plan_fragments([TensorSpec(name="w", shape=(2, 3))], num_fragments=1, pattern="strided")
    with pytest.raises(ValueError, match="'w' of fragment 0 is missing"):
        gather(spec, {})
    with pytest.raises(ValueError, match=r"'w' of fragment 0 has shape \(3, 2\), planned \(2, 3\)"):
        gather(spec, {"w": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="out has shape"):
        gather(spec, {"w": torch.zeros(2, 3)}, torch.empty(5))
    with pytest.raises(ValueError, match="not contiguous"):
        scatter(spec, torch.zeros(6), {"w": torch.zeros(3, 2).t()})
    with pytest.raises(IndexError, match="has 1 chunks"):
        spec.chunk_slice(1)


def test_a_fragment_survives_pickling() -> None:
    (spec,) = plan_fragments(llama_specs(2), num_fragments=1, pattern="strided")
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_planning_does_not_import_torch() -> None:
    code = "import sys, strategies.fragments, strategies.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "False"


def test_fragments_of_your_own_take_the_first_pattern_that_fits() -> None:
    groups = [["*embed*", "*.1.*"], ["*.0.*"], ["*"]]
    fragments = plan_fragments(llama_specs(3), num_fragments=1, pattern="strided", groups=groups)
    names = [[tensor.name for tensor in fragment.tensors] for fragment in fragments]
    assert all("embed" in name or ".1." in name for name in names[0]) and names[0]
    assert all(".0." in name for name in names[1]) and names[1]
    assert sum(len(group) for group in names) == len(llama_specs(3))


def test_fragments_of_your_own_must_hold_everything_and_not_be_empty() -> None:
    with pytest.raises(ValueError, match=r"strategy\.fragments: parameter '.*' fits no pattern"):
        plan_fragments(llama_specs(2), num_fragments=1, pattern="strided", groups=[["*.0.*"]])
    with pytest.raises(ValueError, match=r"no parameter is left for fragment 1, \['\*embed\*'\]"):
        plan_fragments(llama_specs(2), num_fragments=1, pattern="strided", groups=[["*"], ["*embed*"]])
