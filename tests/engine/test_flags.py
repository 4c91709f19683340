"""vLLM's own arguments under `[engine.vllm]`: handed on as its command line reads them, mistakes named."""

from pathlib import Path

import pytest

from server.config import EngineSettings
from server.engine.arguments import engine_arguments
from server.engine.base import EngineError
from server.engine.flags import passed_on

pytestmark = pytest.mark.engine


def test_values_are_read_as_on_vllms_command_line() -> None:
    given = {
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": "2",  # from the environment
        "enable_prefix_caching": False,
        "trust_remote_code": "true",
        "gpu_memory_utilization": 0.8,
        "hf_overrides": {"rope_theta": 1.5},
        "kv_cache_dtype": "fp8",
        "seed": -1,
    }
    assert passed_on(given, ()) == given | {"pipeline_parallel_size": 2, "trust_remote_code": True}
    assert passed_on({}, ()) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"tensor_paralel_size": 2},
            r"engine.vllm.tensor_paralel_size: vLLM has no such .* \(did you mean 'tensor_parallel_size'\?\)",
        ),
        ({"tensor-parallel-size": 2}, r"did you mean 'tensor_parallel_size'"),
        ({"zzz": 2}, "engine.vllm.zzz: vLLM has no such engine argument$"),
        ({"max_num_seqs": 2}, "engine.vllm.max_num_seqs is set by the gateway; set engine.max_num_seqs instead"),
        ({"worker_extension_cls": "x"}, "engine.vllm.worker_extension_cls is set by the gateway; it cannot be changed"),
        ({"data_parallel_size": 2}, "run more servers instead"),
        ({"tensor_parallel_size": "two"}, "engine.vllm: argument --tensor-parallel-size"),
        ({"kv_cache_dtype": "fp7"}, "engine.vllm: argument --kv-cache-dtype: invalid choice: 'fp7'"),
    ],
)
def test_mistakes_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        passed_on(given, engine_arguments(Path("base"), EngineSettings()))
