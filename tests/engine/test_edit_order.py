"""Where a probe may read beside an edit: the worker and the gateway draw the same line, and the score is of the unedited row."""

from types import SimpleNamespace

import pytest
import torch

from server.artifacts.versions import ProbeFacts
from server.core import InvalidRequest
from server.steering import Probe as PlannedProbe
from server.steering import Tables, _check_order, planned_edit
from tests.engine.edit_bed import WIDTH, Edits, edit, write_random_profile, write_random_sae

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Edits:
    folder = tmp_path_factory.mktemp("edits")
    write_random_profile(folder / "profile.safetensors", probe_layer=1)
    for layer in (0, 1, 2):
        write_random_sae(folder / f"sae-{layer}.safetensors", layer)
    return Edits(folder)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_worker_refuses_what_the_gateway_refuses(edits: Edits, layer: int) -> None:
    """The probe reads layer 1."""
    from server.engine.worker.resident import EditLoadError, load_edit

    tables = Tables((edits.sae(layer, (3, "set", 0.8)),), frozenset(), features=1, first_layer=layer)
    probe = PlannedProbe(ProbeFacts(layer=1, threshold=0.5, auroc=0.9), "p" * 64)
    planned = planned_edit(tables, probe, edits.probe()["path"])
    assert planned is not None
    layers = SimpleNamespace(owned=range(3), count=3, width=WIDTH)

    def refusal(check) -> str:
        try:
            check()
        except (InvalidRequest, EditLoadError) as problem:
            return str(problem)
        return ""

    gateway = refusal(lambda: _check_order(probe, tables, "features"))
    worker = refusal(lambda: load_edit("f" * 64, planned.edit.spec, layers, torch.device("cpu")))
    assert ["behind the first edited layer" in said for said in (gateway, worker)] == [layer < 1] * 2


def test_a_row_is_scored_before_it_is_edited(edits: Edits) -> None:
    from server.engine.worker.edit_plan import Chunk, RunningEdit, build
    from server.engine.worker.edit_report import Report
    from server.engine.worker.edits import EditState, LayerHook
    from server.engine.worker.resident import load_edit

    layers = SimpleNamespace(owned=range(3), count=3, width=WIDTH)
    made = edit(edits.sae(1, (3, "set", 40.0)), prompt="all", probe=edits.probe())
    resident = load_edit(made.fingerprint, made.spec, layers, torch.device("cpu"))
    running = RunningEdit(resident, 4, Report())
    state = EditState(build([Chunk("a", 0, 0, 4)], {"a": running}, torch.device("cpu")))
    hidden = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    residual, before = torch.ones(4, WIDTH), hidden.clone()
    LayerHook(1, state).apply(hidden, residual)
    assert resident.probe is not None
    expected, edited = (float(resident.probe.score((h + residual)[-1:])) for h in (before, hidden))
    assert running.report.score == pytest.approx(expected, abs=1e-6)
    assert abs(edited - expected) > 0.01
