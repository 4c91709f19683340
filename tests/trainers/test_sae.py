"""SAE training: the sparse gradients are the dense ones, the recording is shuffled and resumable, and a tiny run reconstructs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from steering.activations import load_model, read_streams
from steering.formats import load_sae, pack_sae
from steering.header import read_maxima
from trainers import sae_loop, sae_report
from trainers.errors import DataError, RecipeError, RunError
from trainers.sae import train_saes
from trainers.sae_harvest import harvest
from trainers.sae_recipe import SAERecipe, load_sae_recipe
from trainers.sae_step import Weights, keep, project, step


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _recipe(**train: object) -> SAERecipe:
    return SAERecipe.model_validate(
        {
            "name": "tiny",
            "description": "for tests",
            "layers": [0, 1],
            "data": {"tokens": 5000, "context": 32, "qa_share": 0.0, "batch_size": 16, "text": ["*.txt"]},
            "train": {"expansion": 4, "k": 8, "epochs": 8, "batch_size": 256, "learning_rate": 3e-3, "save_every": 20}
            | train,
        }
    )


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = (
        "river",
        "boats",
        "lie",
        "old",
        "quiet",
        "town",
        "people",
        "tell",
        "long",
        "tales",
        "storms",
        "past",
        "rows",
    )
    generator = np.random.default_rng(0)
    paragraphs = [" ".join(generator.choice(words, 60)) for _ in range(400)]
    (folder / "tales.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    return folder


@pytest.mark.parametrize("batch_wide", [False, True])
def test_sparse_gradients_equal_autograd(batch_wide: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    w = Weights.initial(torch.randn(16, generator=generator), 64, generator)
    w.b_enc += 0.1 * torch.randn(64, generator=generator)
    x = torch.randn(32, 16, generator=generator)
    dead = torch.arange(64) < 20
    found = step(w, x, 4, batch_wide, dead, 1 / 32)

    enc, b_enc, dec, b_dec = (tensor.clone().requires_grad_() for tensor in w.tensors())
    pre = (x - b_dec) @ enc.T + b_enc
    kept = keep(pre.detach(), 4, batch_wide)
    mask = torch.zeros_like(pre).index_put_((kept.row, kept.latent), torch.ones(len(kept.row)))
    error = x - (pre * mask) @ dec - b_dec
    kept = keep(pre.detach()[:, :20], 8, batch_wide=False)
    mask = torch.zeros(32, 20).index_put_((kept.row, kept.latent), torch.ones(len(kept.row)))
    again = (x - b_dec.detach()) @ enc[:20].T + b_enc[:20]
    auxiliary = error.detach() - (again * mask) @ dec[:20]
    loss = error.square().sum(1).mean() + auxiliary.square().sum(1).mean() / 32
    loss.backward()
    for ours, theirs in zip(found.gradients, (enc, b_enc, dec, b_dec), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-5)
    assert found.squared_error == pytest.approx(error.detach().square().sum().item(), rel=1e-5)


def test_batch_wide_selection_spends_its_budget_where_it_is_needed() -> None:
    pre = torch.zeros(2, 8) - 1
    pre[0, :4] = torch.tensor([5.0, 4.0, 3.0, 2.0])
    pre[1, 0] = 1.0
    per_row, batch_wide = keep(pre, 2, False), keep(pre, 2, True)
    assert sorted(zip(per_row.row.tolist(), per_row.latent.tolist(), strict=True)) == [(0, 0), (0, 1), (1, 0)]
    assert sorted(zip(batch_wide.row.tolist(), batch_wide.latent.tolist(), strict=True)) == [(0, i) for i in range(4)]


def test_decoder_gradient_keeps_row_lengths() -> None:
    w = Weights.initial(torch.zeros(8), 12, torch.Generator().manual_seed(0))
    gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    project(w, gradient)
    assert (gradient * w.dec).sum(1).abs().max() < 1e-5


def test_recording_is_shuffled_complete_and_resumable(tiny_base: Path, tmp_path: Path) -> None:
    model = load_model(tiny_base)
    ids = torch.randint(0, model.config.vocab_size, (70, 16), generator=torch.Generator().manual_seed(0))
    data = _recipe().data.model_copy(update={"batch_size": 2})
    whole = harvest(lambda: model, ids, (0, 1), data, tmp_path / "whole", "key", 3)
    forwards = 0

    def failing() -> object:
        class Model:
            config, model_ = model.config, model

            def __getattr__(self, name: str) -> object:
                return getattr(model, name)

            def __call__(self, **arguments: object) -> object:
                nonlocal forwards
                forwards += 1
                if forwards == 20:
                    raise KeyboardInterrupt
                return model(**arguments)

        return Model()

    with pytest.raises(KeyboardInterrupt):
        harvest(failing, ids, (0, 1), data, tmp_path / "cut", "key", 3)
    left = json.loads((tmp_path / "cut" / "harvest.json").read_text())
    assert left["sequences"] == 32
    cut = harvest(lambda: model, ids, (0, 1), data, tmp_path / "cut", "key", 3)
    expected = read_streams(model, ids, [0, 1])
    for layer in (0, 1):
        assert np.array_equal(whole.layer(layer), cut.layer(layer))
        rows = expected[layer][:, 1:].reshape(-1, whole.width).half().numpy()
        assert not np.array_equal(rows, whole.layer(layer)), "not shuffled"
        assert {row.tobytes() for row in rows} == {row.tobytes() for row in np.asarray(whole.layer(layer))}
    with pytest.raises(RunError, match="another recipe"):
        harvest(lambda: model, ids, (0, 1), data, tmp_path / "cut", "other", 3)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_tiny_run_reconstructs_and_saves_what_it_measured(
    architecture: str, tiny_base: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sae_report, "_CHUNK", 64)  # so that the held-out rows are measured in several parts
    run = train_saes(_recipe(architecture=architecture), text_folder, tmp_path / "run", str(tiny_base), False)
    assert [report.layer for report in run.reports] == [0, 1]
    recording = np.memmap(tmp_path / "run" / "activations" / "layer-1.f16", np.float16, "r")
    for report in run.reports:
        assert report.fvu < 0.5
        assert 4 < report.l0 < 10
        sae = load_sae(run.folders[report.layer])
        assert sae.architecture == ("topk" if architecture == "topk" else "jumprelu")
        assert sae.hook.layer == report.layer
    rows = torch.from_numpy(recording.reshape(-1, sae.d_in)[: report.rows].astype(np.float32))
    error = (rows - sae.reconstruct(rows)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert float(error) == pytest.approx(report.fvu, rel=1e-3)
    assert sae.maxima is not None
    torch.testing.assert_close(sae.maxima, sae.encode(rows).amax(0), rtol=1e-4, atol=1e-5)
    pack_sae(sae, tmp_path / "one.safetensors")
    assert read_maxima(tmp_path / "one.safetensors", range(sae.d_sae)) == sae.maxima.tolist()
    assert {"report.json", "report.md", "report.png", "run.json"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


@pytest.mark.slow
def test_interrupted_training_ends_with_the_same_weights(
    tiny_base: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(dead_after=300)  # so soon that dead latents are part of the loss
    whole = train_saes(recipe, text_folder, tmp_path / "whole", str(tiny_base), False)
    real, steps = sae_loop.step, 0

    def cut(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 250:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]  # handed on as they come

    with monkeypatch.context() as patch:
        patch.setattr(sae_loop, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            train_saes(recipe, text_folder, tmp_path / "cut", str(tiny_base), False)
    with pytest.raises(RunError, match="--resume"):
        train_saes(recipe, text_folder, tmp_path / "cut", str(tiny_base), False)
    resumed = train_saes(recipe, text_folder, tmp_path / "cut", str(tiny_base), True)
    for layer, folder in whole.folders.items():
        assert torch.equal(load_sae(folder).w_dec, load_sae(resumed.folders[layer]).w_dec)


def test_bad_recipes_are_told(tiny_base: Path, text_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('name = "a"\ndescription = ""\nlayers = [3, 2]\n')
    with pytest.raises(RecipeError, match=r"layers.*ascending"):
        load_sae_recipe(path)
    path.write_text('name = "a"\ndescription = ""\nlayers = [1]\n[train]\nepoch = 3\n')
    with pytest.raises(RecipeError, match="did you mean 'epochs'"):
        load_sae_recipe(path)
    greedy = _recipe()
    greedy = greedy.model_copy(update={"data": greedy.data.model_copy(update={"tokens": 10_000_000})})
    with pytest.raises(DataError, match="ask for fewer"):
        train_saes(greedy, text_folder, tmp_path / "run", str(tiny_base), False)


def test_the_shipped_recipe_is_valid() -> None:
    shipped = load_sae_recipe(Path(sae_loop.__file__).parent / "recipes" / "sae.toml")
    assert len(shipped.layers) == 4
