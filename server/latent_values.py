"""Values of an edit's features as plain numbers: those given as a multiple of a latent's recorded maximum are looked up."""

from pathlib import Path

from server.artifacts.versions import SAEVersion
from server.core import InvalidRequest, OfMax, SAEEdit
from server.steering_schema import MAX_VALUE
from steering.header import read_maxima


def plain_values(edit: SAEEdit, version: SAEVersion, path: Path, at: str) -> list[float]:
    """One number per feature of `edit`, whose ids the SAE at `path` has; `at` is where the request says so.

    Raises InvalidRequest where the SAE records no maxima, or that one latent never fired.
    """
    relative = [(number, found) for number, found in enumerate(edit.features) if isinstance(found.value, OfMax)]
    if relative and not version.has_maxima:
        message = (
            "the SAE records no maxima of its latents: give a plain number, or upload it packed from a folder that has "
            "maxima.safetensors, as `deltaworks train sae` writes it"
        )
        raise InvalidRequest(message, param=f"{at}.features.{relative[0][0]}.value")
    maxima = (
        dict(zip(relative, read_maxima(path, [found.id for _, found in relative]), strict=True)) if relative else {}
    )
    values = []
    for number, found in enumerate(edit.features):
        if not isinstance(found.value, OfMax):
            values.append(found.value)
            continue
        param, maximum = f"{at}.features.{number}.value", maxima[number, found]
        if maximum == 0:
            message = f"feature {found.id} never fired where the SAE's maxima were recorded: give a plain number"
            raise InvalidRequest(message, param=param)
        values.append(found.value.factor * maximum)
        if not abs(values[-1]) <= MAX_VALUE:
            message = f"{found.value.factor:g} times the maximum {maximum:g} is over the limit of {MAX_VALUE:g}"
            raise InvalidRequest(message, param=param)
    return values
