"""Our sampling in vLLM's words, and vLLM's refusals in ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.core import Sampling, Structure
from server.engine.base import EngineDelta, GrammarError, SamplingError

if TYPE_CHECKING:
    from vllm.exceptions import VLLMValidationError
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams


def sampling_params(sampling: Sampling, delta: EngineDelta | None) -> SamplingParams:
    """A fine-tune's end tokens stand in place of the base's, which `ignore_eos` takes away, unless it keeps those too.

    Raises vLLM's VLLMValidationError.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    end_ids = delta.stop_ids if delta is not None and not sampling.ignore_eos else ()
    own_only = delta is not None and bool(delta.stop_ids) and not delta.base_stops
    # vLLM takes one choice only where it is greedy; the likeliest token alone, sampled, is the same.
    greedy_choices = sampling.temperature == 0 and sampling.n > 1
    return SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=1.0 if greedy_choices else sampling.temperature,
        top_p=1.0 if greedy_choices else sampling.top_p,
        top_k=1 if greedy_choices else sampling.top_k,
        min_p=0.0 if greedy_choices else sampling.min_p,
        seed=sampling.seed,
        stop=list(sampling.stop),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        ignore_eos=sampling.ignore_eos or own_only,
        stop_token_ids=[*sampling.stop_token_ids, *end_ids],
        structured_outputs=None if sampling.structure is None else _structured(sampling.structure),
        skip_special_tokens=sampling.skip_special_tokens,
        output_kind=RequestOutputKind.DELTA,
    )


def sampling_error(error: VLLMValidationError, sampling: Sampling) -> SamplingError:
    """What vLLM says of a request before it runs; where it names no field, it is the structure that it cannot hold to."""
    message, structure = str(error.args[0]), sampling.structure
    if error.parameter is None and structure is not None:
        return GrammarError(message, param=structure.field)
    return SamplingError(message, param=error.parameter)


def check_grammar(output: RequestOutput, structure: Structure) -> None:
    """vLLM ends a request whose grammar does not compile as an "error", before its first token. Raises GrammarError."""
    if any(choice.finish_reason == "error" and not choice.token_ids for choice in output.outputs):
        raise GrammarError(f"the grammar of {structure.field} could not be built", param=structure.field)


def _structured(structure: Structure) -> StructuredOutputsParams:
    from vllm.sampling_params import StructuredOutputsParams

    match structure.kind:
        case "json_schema":
            return StructuredOutputsParams(json=structure.rule)
        case "json_object":
            return StructuredOutputsParams(json_object=True)
        case "regex":
            return StructuredOutputsParams(regex=structure.rule)
        case "choice":
            return StructuredOutputsParams(choice=list(structure.choices))
        case "grammar":
            return StructuredOutputsParams(grammar=structure.rule)
