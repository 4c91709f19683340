"""What our code asks of vLLM's classes: the names it rests on, the places of fused and sharded weights, the compiled op."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compressors.execution import Shard, SparseFactor
from compressors.kernels.torch_csr import TorchCsr
from server.engine.worker import compat

pytestmark = pytest.mark.engine


def test_the_installed_vllm_has_every_name():
    assert compat.problems() == []


def test_a_changed_name_is_reported():
    broken = (
        compat.Touched("vllm.lora.request", "NoSuchRequest"),
        compat.Touched("vllm.v1.engine.async_llm", "AsyncLLM.add_lora", ("lora_request", "colour")),
        compat.Touched("vllm.no_such_module", "x"),
    )
    missing, signature, module = compat.problems(broken)
    assert "NoSuchRequest is missing" in missing
    assert "colour" in signature
    assert "vllm.no_such_module" in module


def layer(kind, **fields):
    made = kind.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def placement(linears):
    from server.engine.worker.placement import Placement

    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    return Placement(SimpleNamespace(packed_modules_mapping=packed), linears)


def test_places_of_fused_and_sharded_weights():
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    # Rank 3 of 4; 8 heads of width 16, 2 KV heads: each KV head lives on two ranks.
    qkv = layer(
        QKVParallelLinear,
        num_heads=2,
        num_kv_heads=1,
        head_size=16,
        v_head_size=16,
        num_kv_head_replicas=2,
        tp_rank=3,
        tp_size=4,
    )
    merged = layer(MergedColumnParallelLinear, output_sizes=[64, 64], tp_rank=3, tp_size=4)
    row = layer(RowParallelLinear, input_size_per_partition=16, tp_rank=3, tp_size=4)
    found = placement({"m.qkv_proj": qkv, "m.gate_up_proj": merged, "m.down_proj": row})
    assert found.place("m.q_proj.weight", (128, 32)).shard == Shard((96, 128), (0, 32), 0)
    assert found.place("m.k_proj.weight", (32, 32)).shard == Shard((16, 32), (0, 32), 32)
    assert found.place("m.v_proj.weight", (32, 32)).shard == Shard((16, 32), (0, 32), 48)
    assert found.place("m.up_proj.weight", (64, 32)).shard == Shard((48, 64), (0, 32), 16)
    assert found.place("m.gate_up_proj.weight#1", (64, 32)).shard == Shard((48, 64), (0, 32), 16)
    assert found.place("m.down_proj.weight", (32, 64)).shard == Shard((0, 32), (48, 64), 0)


def test_a_weight_without_a_linear_is_named():
    from vllm.model_executor.layers.linear import RowParallelLinear

    from server.engine.worker.placement import PlacementError

    row = layer(RowParallelLinear, input_size_per_partition=16, tp_rank=0, tp_size=1)
    with pytest.raises(PlacementError, match=r"m\.norm\.weight"):
        placement({"m.down_proj": row}).place("m.norm.weight", (16, 16))
    with pytest.raises(PlacementError, match="too small"):
        placement({"m.down_proj": row}).place("m.down_proj.weight", (16, 8))


def test_the_op_survives_compilation():
    """A compiled linear applies the plan of the step that runs, not the one it was compiled with."""
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    from server.engine.worker.linear import DeltaLinear, DeltaLinearMethod, DeltaState, op_library
    from server.engine.worker.plan import Planner

    op_library()
    product = TorchCsr(torch.device("cpu"))
    entries = np.array([(1.0, 0)], dtype=[("value", np.float32), ("row", np.uint32)])
    ends = np.array([0, 1], dtype=np.int64)
    factor = SparseFactor(4, 3, 0, np.array([2.0], dtype=np.float32), ends, ends, entries, entries)
    linear = DeltaLinear(DeltaState(product), {7: (product.prepare([factor]),)})
    weight = torch.ones(4, 3)
    inner = SimpleNamespace(apply=lambda layer, x, bias: torch.nn.functional.linear(x, weight))
    method = DeltaLinearMethod(inner, linear, "deltaworks.test")
    compiled = torch.compile(lambda x: method.apply(None, x), backend="aot_eager", fullgraph=True)
    config = VllmConfig()
    config.compilation_config.static_forward_context["deltaworks.test"] = linear
    x, planner = torch.ones(3, 3), Planner()
    with set_forward_context(None, config):
        for ids in ((0, 0, 0), (0, 7, 0), (7, 0, 7), (0, 0, 0)):
            linear.state.plan = planner.plan(ids)
            expected = torch.full((3, 4), 3.0)
            expected[[i for i, adapter in enumerate(ids) if adapter], 0] += 2.0
            assert torch.equal(compiled(x), expected)


def test_engines_without_our_key_get_the_stock_manager(monkeypatch):
    from vllm.lora import worker_manager

    from server.engine.worker.plugin import choose_manager

    monkeypatch.setattr(worker_manager, "LRUCacheWorkerLoRAManager", lambda *arguments: ("stock", *arguments))
    other = SimpleNamespace(additional_config={"someone": {}})
    assert choose_manager(other, torch.device("cpu"), {})[0] == "stock"
