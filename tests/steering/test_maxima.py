"""The largest activation of each latent: kept beside a SAELens folder, carried into the one-file form, read latent by latent."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steering.errors import SAEFormatError
from steering.formats import check_sae_file, load_sae, open_sae, pack_sae, save_saelens
from steering.header import has_maxima, read_maxima, read_sae_header
from tests.steering.conftest import MakeSAE

MAXIMA = torch.linspace(0, 19.5, 40)


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_a_folder_and_a_file_carry_them(make_sae: MakeSAE, tmp_path: Path, normalize: str) -> None:
    folder, file = tmp_path / "sae", tmp_path / "one.safetensors"
    save_saelens(make_sae("jumprelu", normalize, maxima=MAXIMA), folder)
    assert torch.equal(load_file(folder / "maxima.safetensors")["maxima"], MAXIMA)
    assert torch.equal(load_sae(folder).maxima, MAXIMA)
    pack_sae(load_sae(folder), file, torch.bfloat16)
    assert torch.equal(load_file(file)["max"], MAXIMA)
    assert torch.equal(load_sae(file).maxima, MAXIMA)
    assert check_sae_file(file, None, 12, 4) == read_sae_header(file)
    assert has_maxima(file)
    assert read_maxima(file, [39, 0, 7]) == [float(MAXIMA[39]), 0.0, float(MAXIMA[7])]
    save_saelens(load_sae(file), tmp_path / "again")
    assert torch.equal(load_sae(tmp_path / "again").maxima, MAXIMA)


def test_without_them_everything_is_as_before(make_sae: MakeSAE, tmp_path: Path) -> None:
    folder, file = tmp_path / "sae", tmp_path / "one.safetensors"
    save_saelens(make_sae(maxima=MAXIMA), folder)
    save_saelens(make_sae(), folder)  # the maxima of another SAE must not stay behind
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert load_sae(folder).maxima is None
    pack_sae(load_sae(folder), file)
    assert set(open_sae(file).tensors) == {"W_enc", "W_dec", "b_dec", "b_enc", "threshold"}
    assert not has_maxima(file)
    assert load_sae(file).maxima is None


@pytest.mark.parametrize(
    ("maxima", "message"),
    [
        (torch.ones(39), r"max is \[39\]"),
        (torch.ones(40, dtype=torch.float16), "not in fp32"),
        (torch.full((40,), float("nan")), "max has values that are not finite"),
        (-torch.ones(40), "below 0"),
    ],
)
def test_wrong_ones_are_refused(make_sae: MakeSAE, tmp_path: Path, maxima: torch.Tensor, message: str) -> None:
    file = tmp_path / "one.safetensors"
    pack_sae(make_sae(), file)
    header = read_sae_header(file).model_dump_json()
    save_file(load_file(file) | {"max": maxima}, file, metadata={"deltaworks.sae": header})
    with pytest.raises(SAEFormatError, match=message):
        check_sae_file(file, None, 12, 4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: save_file({"maxima": torch.ones(39)}, path), r"maxima has shape \[39\]"),
        (lambda path: save_file({"maxima": -torch.ones(40)}, path), "below 0"),
        (lambda path: save_file({"other": torch.ones(40)}, path), "lacks the tensor maxima"),
        (lambda path: path.write_bytes(b"rubbish"), "cannot be read"),
    ],
)
def test_wrong_ones_beside_a_folder_are_refused(
    make_sae: MakeSAE, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    save_saelens(make_sae(), tmp_path / "sae")
    spoil(tmp_path / "sae" / "maxima.safetensors")
    with pytest.raises(SAEFormatError, match=message):
        load_sae(tmp_path / "sae")
