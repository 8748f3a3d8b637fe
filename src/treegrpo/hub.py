"""The Hugging Face hub, asked once and soon whether it is there.

Its client would try again for half a minute, for each file anew.

Left out: what is downloaded, and what is said where it cannot be (`models/folder.py`,
`rewards/checkpoints.py`, `prompts.py`).
"""

from __future__ import annotations

from functools import cache

from treegrpo.errors import reason

ANSWER_SECONDS = 5.0


@cache
def why_not_there() -> str | None:
    """Why the hub cannot be reached; None where it answers.

    Without an answer its client works offline from then on: what was downloaded before is found,
    and anything else is an error at once.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception as error:  # of the client's transport, of which there have been several
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer: {reason(error)}"
    return None
