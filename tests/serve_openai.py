"""Drives a server of the pocket model through the official client: BASE_URL PICTURE.

Every claim is an assert; the last line of stdout is what was seen, as JSON.
"""

import base64
import json
import sys
from typing import Literal

import openai
import pydantic

base, picture = sys.argv[1:]
client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=60)
model = client.models.list().data[0].id
url = "data:image/png;base64," + base64.b64encode(open(picture, "rb").read()).decode()
image = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
seen = {}


def ask(text="What is it?", **options):
    options.setdefault("messages", [{"role": "user", "content": text}])
    options.setdefault("max_completion_tokens", 24)
    return client.chat.completions.create(model=model, **options)


# Pictures, several to a message, and an earlier answer.
first = ask(messages=[{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}])
answer = first.choices[0].message
assert answer.role == "assistant" and answer.content and answer.tool_calls is None
two = ask(
    messages=[
        {"role": "system", "content": "Answer in short."},
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        answer.model_dump(),
        {"role": "user", "content": [image, image, {"type": "text", "text": "And here?"}]},
    ]
)
assert two.usage.prompt_tokens > first.usage.prompt_tokens + 2 * 64, two.usage
seen["usage"] = [first.usage.prompt_tokens, two.usage.prompt_tokens]

# Streaming.
stream = list(ask(stream=True, stream_options={"include_usage": True}))
whole = ask()
text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
assert text == whole.choices[0].message.content
assert stream[0].choices[0].delta.role == "assistant"
assert stream[-2].choices[0].finish_reason == whole.choices[0].finish_reason
assert stream[-1].choices == [] and stream[-1].usage.total_tokens == whole.usage.total_tokens
assert all(chunk.usage is None for chunk in stream[:-1])
assert len({chunk.id for chunk in stream}) == 1

# Seeds and choices.
pictured = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]


def draw(seed, **options):
    return ask(messages=pictured, n=3, temperature=2, seed=seed, max_completion_tokens=40, **options)


several = draw(3)
texts = [choice.message.content for choice in several.choices]
assert [choice.index for choice in several.choices] == [0, 1, 2]
assert texts == [choice.message.content for choice in draw(3).choices]
assert len(set(texts)) > 1, texts
assert texts != [choice.message.content for choice in draw(4).choices]
parts = ["", "", ""]
for chunk in draw(3, stream=True):
    parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
assert parts == texts
seen["choices"] = texts

# Log-probabilities.
told = ask(logprobs=True, top_logprobs=3)
tokens = told.choices[0].logprobs.content
assert b"".join(bytes(token.bytes) for token in tokens).decode().strip() == told.choices[0].message.content
for token in tokens:
    top = [entry.logprob for entry in token.top_logprobs]
    assert len(top) == 3 and top == sorted(top, reverse=True) and token.logprob <= 0
    # Greedy takes the likeliest.
    assert token.logprob == top[0]
streamed = [t for chunk in ask(logprobs=True, stream=True) if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
assert [t.bytes for t in streamed] == [t.bytes for t in tokens]

# Stop texts.
content = answer.content
word = content.split()[1]
stopped = ask(messages=pictured, stop=[word, "never"])
assert stopped.choices[0].finish_reason == "stop" and word not in stopped.choices[0].message.content
assert content.startswith(stopped.choices[0].message.content)
content = whole.choices[0].message.content


# Structured output.
class Seen(pydantic.BaseModel):
    zebra: Literal["dog", "cat"]
    count: Literal[1, 2, 3]
    sure: bool


for _ in range(2):
    parsed = client.chat.completions.parse(
        model=model, messages=[{"role": "user", "content": "What is it?"}], response_format=Seen, temperature=1.0
    )
    assert isinstance(parsed.choices[0].message.parsed, Seen), parsed
    # In the order of the schema.
    assert list(json.loads(parsed.choices[0].message.content)) == ["zebra", "count", "sure"]
seen["parsed"] = parsed.choices[0].message.content
anything = ask(response_format={"type": "json_object"}, max_completion_tokens=200)
assert anything.choices[0].finish_reason == "length" or isinstance(json.loads(anything.choices[0].message.content), dict)

# Tools.
look = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look somewhere.",
        "parameters": {
            "type": "object",
            "properties": {"where": {"enum": ["left", "right"]}, "far": {"type": "boolean"}},
            "required": ["where", "far"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
wait = {"type": "function", "function": {"name": "wait"}}
question = [{"role": "user", "content": "What is on the left?"}]
called = ask(messages=question, tools=[look, wait], tool_choice="required", parallel_tool_calls=False, max_completion_tokens=200)
choice = called.choices[0]
assert choice.finish_reason == "tool_calls" and choice.message.content is None and len(choice.message.tool_calls) == 1
named = {"type": "function", "function": {"name": "look"}}
called = ask(messages=question, tools=[look, wait], tool_choice=named, max_completion_tokens=200)
call = called.choices[0].message.tool_calls[0]
assert call.type == "function" and call.function.name == "look"
assert set(json.loads(call.function.arguments)) == {"where", "far"}
seen["call"] = call.function.arguments
name, arguments, ids, pieces = "", "", [], 0
for chunk in ask(messages=question, tools=[look, wait], tool_choice=named, max_completion_tokens=200, stream=True):
    for part in chunk.choices[0].delta.tool_calls or []:
        assert part.index == 0
        name += part.function.name or ""
        arguments += part.function.arguments or ""
        ids += [part.id] if part.id else []
        pieces += 1
assert (name, arguments, len(ids)) == ("look", call.function.arguments, 1), (name, arguments, ids)
assert pieces > 3, pieces
result = {"role": "tool", "tool_call_id": call.id, "content": "a dog"}
after = ask(messages=[*question, called.choices[0].message.model_dump(), result], tools=[look, wait], tool_choice="none")
assert after.choices[0].message.content and after.choices[0].message.tool_calls is None
parsed = client.chat.completions.parse(model=model, messages=question, tools=[look], tool_choice=named)
assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments["where"] in ("left", "right")

# Responses.
response = client.responses.create(model=model, input="What is it?", max_output_tokens=24)
assert response.status == "completed" and response.output_text == content, response
asked = [{"role": "user", "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What is it?"}]}]
shown = client.responses.create(model=model, input=asked, max_output_tokens=24)
assert shown.output_text == answer.content, (shown.output_text, answer.content)
events = list(client.responses.create(model=model, input="What is it?", max_output_tokens=24, stream=True))
assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == content
assert [event.sequence_number for event in events] == list(range(len(events)))
short = client.responses.create(model=model, input="What is it?", max_output_tokens=2)
assert short.status == "incomplete" and short.incomplete_details.reason == "max_output_tokens"
assert isinstance(client.responses.parse(model=model, input="What is it?", text_format=Seen).output_parsed, Seen)


# Errors.
def fails(kind, call, code=None, param=None):
    try:
        call()
    except openai.APIStatusError as error:
        assert type(error) is kind, (type(error), error)
        assert error.code == code and (param is None or error.param == param), (error.code, error.param)
        assert error.body["message"] and error.type, error.body
        return error.status_code
    raise AssertionError(f"{kind} expected")


other = {"model": "gpt", "messages": question}
remote = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
seen["errors"] = [
    fails(openai.NotFoundError, lambda: client.chat.completions.create(**other), "model_not_found", "model"),
    fails(openai.NotFoundError, lambda: client.models.retrieve("gpt"), "model_not_found"),
    fails(openai.BadRequestError, lambda: ask(messages=remote)),
    fails(openai.BadRequestError, lambda: ask(response_format=schema), param="response_format"),
    fails(openai.BadRequestError, lambda: ask(response_format=schema, stream=True), param="response_format"),
    fails(openai.BadRequestError, lambda: ask(n=1000), param="n"),
    fails(openai.BadRequestError, lambda: ask(store=True), param="store"),
    fails(openai.BadRequestError, lambda: ask(extra_body={"top_k": 5}), param="top_k"),
    fails(openai.BadRequestError, lambda: client.responses.create(model=model, input="a", store=True), param="store"),
    fails(
        openai.BadRequestError,
        lambda: client.responses.create(model=model, input="a", previous_response_id="resp_1"),
        param="previous_response_id",
    ),
]
assert client.models.retrieve(model).id == model
print(json.dumps(seen))
