"""What a try makes of a call: a response that is stored, or another try."""

from __future__ import annotations

from prism_megatron.config.tools.curate import Endpoint
from prism_megatron.curation.calls import Response
from prism_megatron.curation.client.prices import Tokens, cost, in_text
from prism_megatron.endpoints.outcomes import Answered, Outcome, Oversized, Refused


def response_to(outcome: Outcome, endpoint: Endpoint, estimated: Tokens, *, tries: int, last: bool) -> Response | None:
    """What a try has made of a call; None where it is to be tried again, as it is unless this try is the ``last``.

    An endpoint that does not count tokens is taken to charge for about as many as there are.
    """
    url = endpoint.url.rstrip("/")
    if isinstance(outcome, Answered):
        text = outcome.text or ""
        prompt = estimated.prompt if outcome.prompt_tokens is None else outcome.prompt_tokens
        answer = in_text(text) if outcome.answer_tokens is None else outcome.answer_tokens
        return Response(
            kind="answered",
            text=text,
            finish=outcome.finish or "",
            prompt_tokens=outcome.prompt_tokens or 0,
            answer_tokens=outcome.answer_tokens or 0,
            cost=cost(Tokens(prompt, answer), endpoint),
            endpoint=url,
            tries=tries,
        )
    if isinstance(outcome, Oversized):
        return Response("oversized", outcome.problem, cost=cost(estimated, endpoint), endpoint=url, tries=tries)
    if isinstance(outcome, Refused):
        return Response("refused", outcome.problem, endpoint=url, tries=tries)
    return Response("unanswered", outcome.problem, endpoint=url, tries=tries) if last else None
