"""The singular triples of a delta against torch's SVD in fp64."""

import numpy as np
import pytest
import torch

from compressors.baselines import LowRankConfig
from compressors.decompress import delta_tensor
from compressors.impart import ImPartConfig
from compressors.methods import METHODS, encode_projection
from compressors.record import Unwritten
from compressors.spectrum import Spectrum, TooFewTriplesError, decompose, decompose_first, gram


def of_spectrum(values: torch.Tensor, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """A matrix [m, n] with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, len(values), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
    made: torch.Tensor = (u * values) @ v.T
    return made.float()


DECAY = {
    "flat": torch.linspace(1, 0.9, 250, dtype=torch.float64),
    "as of a fine-tune": torch.logspace(0, -2, 250, dtype=torch.float64),
    "steep": torch.logspace(0, -6, 250, dtype=torch.float64),
    "low rank": torch.cat([torch.linspace(1, 0.5, 9, dtype=torch.float64), torch.zeros(241, dtype=torch.float64)]),
}


@pytest.mark.parametrize("shape", [(400, 250), (250, 400), (250, 250)])
@pytest.mark.parametrize("kind", list(DECAY))
@pytest.mark.parametrize("rank", [1, 96, 97, 250])
def test_the_leading_triples_are_those_of_the_svd(shape: tuple[int, int], kind: str, rank: int) -> None:
    delta = of_spectrum(DECAY[kind], *shape)
    found = decompose(delta).leading(rank)
    values = torch.linalg.svdvals(delta.double())[:rank]
    assert (found.u.shape, found.vt.shape) == ((shape[0], rank), (rank, shape[1]))
    assert (found.s.double() - values).abs().max() < 2e-5
    best = torch.linalg.svd(delta.double(), full_matrices=False)
    truncated = (best.U[:, :rank] * best.S[:rank]) @ best.Vh[:rank]
    lost = (delta - (found.u * found.s) @ found.vt).norm()
    assert lost < (delta - truncated).norm() + 1e-4 * delta.norm()
    some = found.s > 1e-3
    for vectors in (found.u.T[some], found.vt[some]):
        assert (vectors @ vectors.T - torch.eye(len(vectors))).abs().max() < 2e-3
    assert (found.u.gather(0, found.u.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_same_numbers_whatever_was_asked_for_before() -> None:
    delta = of_spectrum(DECAY["flat"], 400, 250)
    once, twice = decompose(delta), decompose(delta)
    twice.leading(10)
    twice.leading(250)
    for rank in (100, 192):
        for one, other in zip(vars(once.leading(rank)).values(), vars(twice.leading(rank)).values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("rank", "exact"), [(9, True), (124, True), (140, False), (250, False)])
def test_a_rank_is_known(rank: int, exact: bool) -> None:
    values = torch.cat([torch.linspace(1, 0.5, rank), torch.zeros(250 - rank)]).double()
    spectrum: Spectrum = decompose(of_spectrum(values, 300, 250))
    assert spectrum.exact == exact
    assert spectrum.true_rank == rank
    assert [spectrum.within(limit) for limit in (rank - 1, rank, 250)] == [False, True, True]
    assert rank <= len(spectrum.told_apart) <= (rank if exact else 250)


FAST = torch.logspace(0, -1.5, 300, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(500, 300), (300, 500)])
def test_the_first_triples_are_those_of_the_whole_spectrum(shape: tuple[int, int]) -> None:
    delta = of_spectrum(FAST, *shape)
    first, whole = decompose_first(delta, gram(delta)), decompose(delta)
    assert first is not None
    known = first.inner.shape[1]
    assert known >= 48
    torch.testing.assert_close(first.s[:known], whole.s[:known], rtol=2e-5, atol=0)
    assert (first.s[known:] == first.s[known - 1]).all()
    for one, other in zip(vars(first.leading(40)).values(), vars(whole.leading(40)).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    assert not first.within(known - 1)
    for asked in (first.leading, first.within):
        with pytest.raises(TooFewTriplesError, match=str(known)):
            asked(known)


@pytest.mark.parametrize("values", [DECAY["flat"], torch.logspace(0, -6, 130).double(), torch.ones(20).double()])
def test_where_the_first_triples_do_not_settle_there_are_none(values: torch.Tensor) -> None:
    """A matrix that is small, falls too steeply for squares in fp32, or has no more triples than that."""
    delta = of_spectrum(values, 400, 400 if len(values) < 250 else len(values))
    assert decompose_first(delta, gram(delta)) is None


@pytest.mark.parametrize(
    "config", [ImPartConfig(beta=0.0), ImPartConfig(c=2.0), LowRankConfig(), ImPartConfig(ratio=3.0)]
)
def test_a_record_from_the_first_triples_is_that_from_all(config: ImPartConfig | LowRankConfig) -> None:
    delta = of_spectrum(FAST, 500, 300)
    encode = METHODS[config.method].of_spectrum
    assert encode is not None
    whole = encode("w", decompose(delta), delta, config)
    (found,) = encode_projection("w", delta, [config])
    if config.ratio == 3.0:  # more triples than the first ones are kept
        assert whole.rank > 64
    assert (found.kind, found.rank) == (whole.kind, whole.rank)
    for key, array in whole.arrays.items():
        spread = 1.5 if array.dtype == np.int8 else 2e-4 * np.abs(array).max()  # an int8 may round the other way
        assert np.abs(found.arrays[key].astype(float) - array.astype(float)).max() <= spread, key
    one, other = (delta_tensor(Unwritten(0, record), "w") for record in (found, whole))
    assert (one - other).norm() < 5e-3 * other.norm()
    alike = bool((found.arrays["coef"] == whole.arrays["coef"]).all())
    assert alike == (config.ratio == 3.0)  # as they were made
