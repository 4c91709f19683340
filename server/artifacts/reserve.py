"""How many tokens a fine-tune may add to the base's vocabulary: as many as the server reserved rows for when it started."""

from server.core import GatewayError


class ReserveExceeded(GatewayError):
    """A fine-tune adds more tokens than are reserved; the message names the setting and the number that is needed."""


def check_reserve(added_tokens: int, reserved_tokens: int) -> None:
    """Raises ReserveExceeded."""
    if added_tokens > reserved_tokens:
        raise ReserveExceeded(
            f"the fine-tune adds {added_tokens} tokens to the vocabulary, and engine.reserved_tokens is {reserved_tokens}: "
            f"start the server with at least {added_tokens}"
        )
