"""What a captioner is asked, in which form, and what counts as its answer.

Servers that speak OpenAI's language know more or less of it. A request takes the first of four
forms that the server knows; the next is tried when the server says that it lacks something:

1. `responses`: Responses API with a strict JSON schema;
2. `chat_schema`: Chat Completions with the same schema;
3. `chat_json`: Chat Completions in JSON mode, the schema in the instruction;
4. `chat_text`: Chat Completions in plain text, four labelled lines, read by a strict parser.

What the documentation of servers of one's own says (read in November 2026):

| server | Responses | Chat Completions | Files, Batches |
|---|---|---|---|
| vLLM | not in that guide; newer releases have it | yes, without `detail` | not listed |
| Ollama | since 0.13.3; no `text` among its fields | `response_format`, JSON mode | not listed |
| llama.cpp | turned into a chat request | `json_schema` and `json_object` | not checked |

A server that takes a form and ignores it is not noticed, as it says nothing: its answers do not
parse and are set aside. Begin further down with `OpenAISource.api` there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tomjerry_utils.spending import Detail, Price, image_tokens

Api = Literal["responses", "chat_schema", "chat_json", "chat_text"]
APIS: tuple[Api, ...] = get_args(Api)
SUBJECTS = ("tom", "jerry", "cat", "mouse", "other")
LONGEST_SIDE = 512  # pixels; larger pictures are sent reduced
ANSWERS = 3  # bad answers to one picture before it is set aside

# The words that a captioner is given, by `prompt_version`. Never edit one: captions are kept and
# paid for under its name. Add the next.
PROMPTS = {
    "v1": (
        "Describe who does what and where in this picture, in one plain English sentence of at "
        "most 20 words, in the present tense, ending with the direction the subject faces: "
        "'facing left' or 'facing right'. Call the grey cat of the cartoon 'tom' and the brown "
        "mouse 'jerry', without article; call other cats 'a cat' and other mice 'a mouse'. Say "
        "nothing about the style or quality of the picture: never 'cartoon', 'drawing', "
        "'animated', 'photo' or 'image'. 'action' is one verb in its base form, such as sit, run, "
        "jump, lie, reach or stand. 'place' is one or two words. If none of these animals is "
        "there, 'subjects' is ['other']."
    ),
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "subjects": {"type": "array", "items": {"type": "string", "enum": list(SUBJECTS)}},
        "action": {"type": "string"},
        "place": {"type": "string"},
        "caption": {"type": "string"},
    },
    "required": ["subjects", "action", "place", "caption"],
    "additionalProperties": False,
}
_IN_JSON = "Answer with one JSON object and nothing else, after this schema: "
_IN_LINES = (
    "Answer with exactly four lines and nothing else:\n"
    f"subjects: one or more of {', '.join(SUBJECTS)}, with commas between them\n"
    "action: the verb\nplace: the place\ncaption: the sentence"
)


# ---- requests ------------------------------------------------------------------------------------


def request_body(
    picture: str, *, api: Api, model: str, prompt_version: str, price: Price, detail: Detail
) -> dict[str, Any]:
    """A request about a picture, as the API of its form takes it.

    Args:
        picture: a data URL.
    """
    prompt, longest = PROMPTS[prompt_version], output_tokens(price)[1]
    if api == "responses":
        shown = {"type": "input_image", "image_url": picture, "detail": detail}
        form = {"type": "json_schema", "name": "caption", "schema": SCHEMA, "strict": True}
        body: dict[str, Any] = {
            "model": model,
            "instructions": prompt,
            "input": [{"role": "user", "content": [shown]}],
            "text": {"format": form},
            "max_output_tokens": longest,
            "store": False,
        }
        if price.thinks and model.startswith("gpt-5"):
            body["reasoning"] = {"effort": "low"}
        return body
    if api == "chat_json":
        prompt += f"\n{_IN_JSON}{json.dumps(SCHEMA)}"
    elif api == "chat_text":
        prompt += f"\n{_IN_LINES}"
    # The default goes unsaid: not every server knows the field.
    image = {"url": picture, **({} if detail == "auto" else {"detail": detail})}
    # Templates of small models often drop a system message: all is said by the user.
    content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": image}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": longest,
    }
    if api == "chat_schema":
        schema = {"name": "caption", "schema": SCHEMA, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif api == "chat_json":
        body["response_format"] = {"type": "json_object"}
    return body


def lacks(api: Api, status: int, message: str, code: str) -> bool:
    """True where an error says that the server does not know a form of request.

    A model that is not there is another matter, and so is a picture that is not taken.
    """
    if status in (404, 405, 501) and api == "responses":
        return re.search(r"\bmodel", f"{code} {message}".lower().replace("_", " ")) is None
    if status not in (400, 422, 501) or api == "chat_text":
        return False
    named = r"response_format|text\.format|json_schema|json_object|json mode|grammar|structured"
    return re.search(named, message.lower()) is not None


def request_tokens(
    width: int,
    height: int,
    *,
    prompt_version: str,
    price: Price,
    detail: Detail = "auto",
    longest_side: int = LONGEST_SIDE,
) -> int:
    """Input tokens of a request about a picture: no fewer than it can have.

    Args:
        width: in pixels, before the picture is reduced to `longest_side`; so is `height`.
    """
    # Three characters a token is low for English.
    text = len(PROMPTS[prompt_version]) + len(_IN_JSON) + len(json.dumps(SCHEMA))
    scale = min(1.0, longest_side / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return text // 3 + 64 + image_tokens(*size, price, "low" if detail == "low" else "high")


def output_tokens(price: Price) -> tuple[int, int]:
    """Tokens of an answer: how many to expect, and how many are allowed at most."""
    return (400, 1500) if price.thinks else (60, 300)


# ---- answers -------------------------------------------------------------------------------------


class _Answer(BaseModel):
    # The shape is insisted on; the words are not, since servers differ in how strict they are.
    model_config = ConfigDict(extra="ignore", strict=True)

    subjects: list[str]
    action: str = Field(min_length=1, max_length=60)
    place: str = Field(max_length=60)
    caption: str = Field(min_length=3, max_length=400)


def settled(answers: Sequence[dict[str, Any]]) -> bool:
    """True where another request about the picture makes no sense."""
    if not answers:
        return False
    last = answers[-1]
    if last["status"] == "ok" or last.get("final"):
        return True
    refused = sum(answer["status"] == "refused" for answer in answers)
    return len(answers) >= ANSWERS or refused >= 2


def judge(body: Any, *, api: Api, price: Price, clean: Callable[[str], str]) -> dict[str, Any]:
    """What an answer's body holds: a caption, or why it is none.

    Args:
        clean: makes one line of a server's words.

    Returns:
        `status`, `reason`, `input_tokens`, `output_tokens`, `usd` (None where the server does not
        count), `request_id`; with the status "ok" the four fields of the caption.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, IndexError: it is no answer at all.
    """
    chat = api != "responses"
    usage = body.get("usage") or {}
    names = ("prompt_tokens", "completion_tokens") if chat else ("input_tokens", "output_tokens")
    counted = all(isinstance(usage.get(name), int) for name in names)
    given, taken = (usage[names[0]], usage[names[1]]) if counted else (0, 0)
    record: dict[str, Any] = {
        "api": api,
        "input_tokens": given,
        "output_tokens": taken,
        "usd": price.usd(given, taken) if counted else None,
        "request_id": str(body.get("id") or ""),
        "status": "invalid",
        "reason": "",
    }
    text, refusal, trouble = (_from_chat if chat else _from_responses)(body)
    if refusal:
        return {**record, "status": "refused", "reason": clean(f"refused: {refusal}")}
    if trouble:
        return {**record, "reason": clean(trouble)}
    if not text.strip():
        return {**record, "reason": "empty answer"}
    try:
        if api == "chat_text":
            answer = _Answer.model_validate(parse_lines(text))
        else:
            answer = _Answer.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "text"
        kind = "answer" if api == "chat_text" else "JSON answer"
        return {**record, "reason": clean(f"invalid {kind} ({where}: {first['msg']})")}
    except ValueError as error:
        return {**record, "reason": clean(f"invalid answer ({error})")}
    return {
        **record,
        "status": "ok",
        "caption": " ".join(answer.caption.split()),
        "subjects": list(dict.fromkeys(subject.strip() for subject in answer.subjects)),
        "action": answer.action.strip(),
        "place": answer.place.strip(),
    }


def parse_lines(text: str) -> dict[str, Any]:
    """Four labelled lines as the fields of a caption.

    Raises:
        ValueError: anything that is not exactly them; nothing is guessed.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    wanted = tuple(SCHEMA["required"])
    if len(lines) != len(wanted):
        raise ValueError(f"{len(lines)} lines where {len(wanted)} were asked for")
    found: dict[str, Any] = {}
    for name, line in zip(wanted, lines, strict=True):
        label, colon, value = line.partition(":")
        if label != name or not colon or not value.strip():
            raise ValueError(f"a line '{line[:40]}' where '{name}: …' was asked for")
        found[name] = value.strip()
    found["subjects"] = [part.strip() for part in found["subjects"].split(",")]
    unknown = [name for name in found["subjects"] if name not in SUBJECTS]
    if unknown:
        raise ValueError(f"subject '{unknown[0][:40]}' is none of {', '.join(SUBJECTS)}")
    return found


def _from_responses(body: Any) -> tuple[str, str, str]:
    """Text, refusal and trouble of a Responses API body."""
    parts = [
        part
        for item in body["output"]
        if item["type"] == "message"
        for part in item.get("content") or []
    ]
    refusal = next((part["refusal"] for part in parts if part["type"] == "refusal"), "")
    text = "".join(part["text"] for part in parts if part["type"] == "output_text")
    status, trouble = body.get("status"), ""
    if status == "incomplete":
        why = (body.get("incomplete_details") or {}).get("reason")
        trouble = f"truncated answer ({why or 'no reason given'})"
    elif status not in (None, "completed"):
        trouble = f"answer with status '{status}'"
    return text, refusal, trouble


def _from_chat(body: Any) -> tuple[str, str, str]:
    """Text, refusal and trouble of a Chat Completions body."""
    choice = body["choices"][0]
    why, message = choice.get("finish_reason"), choice["message"]
    refusal = message.get("refusal") or ("content filter" if why == "content_filter" else "")
    trouble = "truncated answer (max_tokens)" if why == "length" else ""
    return message.get("content") or "", refusal, trouble
