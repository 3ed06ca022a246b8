#!/usr/bin/env python3
"""The official OpenAI client, unchanged, against a running cluster: chat, streams, tools, JSON schema, errors.

    tests/clients/openai_client.py http://127.0.0.1:50051

Written for SmolLM2-135M-Instruct; says what it checked, exits 1 at the first thing that is not as OpenAI's API has it.
"""
import json
import sys

import openai

BASE = sys.argv[1].rstrip("/")
client = openai.OpenAI(base_url=f"{BASE}/v1", api_key="any", max_retries=0, timeout=120)
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"type": "string", "enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 24}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def check(what, holds, seen=None):
    print(f"{'ok  ' if holds else 'FAIL'} {what}" + ("" if holds else f": {seen!r}"))
    if not holds:
        sys.exit(1)


def models():
    listed = client.models.list().data
    check("models: one is listed", len(listed) == 1, listed)
    check("models: it is found by its name", client.models.retrieve(listed[0].id).id == listed[0].id)
    return listed[0].id


def chat(model):
    answer = client.chat.completions.create(model=model, messages=FRANCE, temperature=0, max_tokens=20)
    choice = answer.choices[0]
    check("chat: the answer", "Paris" in choice.message.content, choice.message.content)
    check("chat: ended by itself", choice.finish_reason == "stop" and choice.message.role == "assistant", choice)
    usage = answer.usage
    check("chat: usage adds up", usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 30, usage)
    again = client.chat.completions.create(model=model, messages=FRANCE, temperature=0, max_tokens=20)
    check("chat: the same again, from the cache", again.usage.prompt_tokens_details.cached_tokens >= 16, again.usage)
    parts = [{"role": "user", "content": [{"type": "text", "text": FRANCE[0]["content"]}]}]
    same = client.chat.completions.create(model=model, messages=parts, temperature=0, max_completion_tokens=20)
    check("chat: content in parts is the same", same.choices[0].message.content == choice.message.content, same)
    short = client.chat.completions.create(model=model, messages=FRANCE, temperature=0, max_tokens=3)
    check("chat: length", short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3, short)
    return choice.message.content


def streams(model, whole):
    stream = client.chat.completions.create(
        model=model, messages=FRANCE, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    check("stream: the same text", text == whole, text)
    check("stream: begins with the role", chunks[0].choices[0].delta.role == "assistant", chunks[0])
    check("stream: in pieces", len(chunks) > 5, len(chunks))
    ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    check("stream: one end", ends == ["stop"], ends)
    check("stream: last the usage", chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 3, chunks[-1])
    stream = client.chat.completions.create(model=model, messages=FRANCE, max_tokens=400, temperature=0, stream=True)
    for _ in stream:
        break
    stream.close()
    check("stream: may be left in the middle", True)


def choices(model):
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Name a colour."}], n=3, seed=7, temperature=1.2, max_tokens=12
    )
    check("n: three choices", [c.index for c in answer.choices] == [0, 1, 2], answer)
    again = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Name a colour."}], n=3, seed=7, temperature=1.2, max_tokens=12
    )
    texts = lambda a: [c.message.content for c in a.choices]
    check("seed: the same choices again", texts(answer) == texts(again), (texts(answer), texts(again)))
    answer = client.chat.completions.create(
        model=model, messages=FRANCE, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    check("logprobs: every token with three others", len(tokens) == 4 and all(len(t.top_logprobs) == 3 for t in tokens), tokens)
    check("logprobs: greedy draws the best", all(t.token == t.top_logprobs[0].token for t in tokens), tokens)
    joined = b"".join(bytes(t.bytes) for t in tokens).decode()
    check("logprobs: bytes are the text", joined == answer.choices[0].message.content, joined)
    answer = client.chat.completions.create(model=model, messages=FRANCE, temperature=0, max_tokens=20, stop=["Paris"])
    check("stop: ends before it", answer.choices[0].message.content.endswith("is "), answer.choices[0].message.content)


def completions(model):
    answer = client.completions.create(model=model, prompt=["The sky is", "Two plus two is"], temperature=0, max_tokens=5, logprobs=1)
    check("completions: two prompts, two choices", [c.index for c in answer.choices] == [0, 1], answer)
    check("completions: logprobs", len(answer.choices[0].logprobs.tokens) == 5, answer.choices[0].logprobs)
    stream = client.completions.create(model=model, prompt="The sky is", temperature=0, max_tokens=5, stream=True)
    text = "".join(c.choices[0].text for c in stream if c.choices)
    check("completions: the same streamed", text == answer.choices[0].text, (text, answer.choices[0].text))


def forms(model):
    ask = [{"role": "user", "content": "Describe a person as JSON."}]
    schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    answer = client.chat.completions.create(model=model, messages=ask, temperature=0, max_tokens=80, response_format=schema)
    person = json.loads(answer.choices[0].message.content)
    check("json_schema: its form", set(person) == {"name", "age"} and 0 <= person["age"] <= 150, person)
    drawn = client.chat.completions.create(model=model, messages=ask, n=4, seed=3, max_tokens=80, response_format=schema)
    people = [json.loads(c.message.content) for c in drawn.choices]
    check("json_schema: each of four drawn choices", all(set(p) == {"name", "age"} for p in people), people)
    answer = client.chat.completions.create(
        model=model, messages=ask, temperature=0, max_tokens=60, extra_body={"structured_outputs": {"regex": "[A-Z][a-z]{2,9} is [0-9]{2}"}}
    )
    words = answer.choices[0].message.content.split(" ")
    check("regex", len(words) == 3 and words[1] == "is" and words[2].isdigit(), words)
    answer = client.chat.completions.create(
        model=model, messages=FRANCE, temperature=0, extra_body={"structured_outputs": {"choice": ["Rome", "Paris", "Oslo"]}}
    )
    check("choice", answer.choices[0].message.content == "Paris", answer.choices[0].message.content)


def tools(model):
    ask = [{"role": "user", "content": "What is the weather in Paris?"}]
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = client.chat.completions.create(
            model=model, messages=ask, tools=[CITY], tool_choice=choice, temperature=0, max_tokens=120
        )
        calls = answer.choices[0].message.tool_calls
        check(f"tools, {choice if isinstance(choice, str) else 'named'}: a call", calls and calls[0].function.name == "get_weather", answer)
        arguments = json.loads(calls[0].function.arguments)
        check("tools: its arguments fit the schema", arguments["unit"] in "CF" and isinstance(arguments["city"], str), arguments)
        check("tools: ended for it", answer.choices[0].finish_reason == "tool_calls", answer.choices[0].finish_reason)
    stream = client.chat.completions.create(
        model=model, messages=ask, tools=[CITY], tool_choice="required", temperature=0, max_tokens=120, stream=True
    )
    streamed = [call for c in stream if c.choices for call in c.choices[0].delta.tool_calls or []]
    check("tools: the same streamed", streamed and json.loads(streamed[0].function.arguments) == arguments, streamed)
    follow = ask + [
        {"role": "assistant", "content": None, "tool_calls": [calls[0].model_dump()]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": '{"temperature": 21}'},
    ]
    answer = client.chat.completions.create(model=model, messages=follow, tools=[CITY], temperature=0, max_tokens=30)
    check("tools: a result is taken", answer.choices[0].finish_reason in ("stop", "length", "tool_calls"), answer)


def errors(model):
    def refused(kind, what, param, **wrong):
        given = {"model": model, "messages": FRANCE, "max_tokens": 5, **wrong}
        try:
            client.chat.completions.create(**given)
        except kind as error:
            check(f"errors: {what}", error.param == param and error.message, (error.param, error.message))
        else:
            check(f"errors: {what}", False, "accepted")

    refused(openai.BadRequestError, "temperature 9", "temperature", temperature=9)
    refused(openai.BadRequestError, "no messages", "messages", messages=[])
    refused(openai.BadRequestError, "text as temperature", "temperature", extra_body={"temperature": "hot"})
    refused(openai.BadRequestError, "an image", "messages[0].content[0]", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}])
    refused(openai.BadRequestError, "a prompt longer than the context", "input", messages=[{"role": "user", "content": "word " * 9000}])
    refused(openai.BadRequestError, "a broken schema", "response_format", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}})
    refused(openai.NotFoundError, "another model", "model", extra_body={"model": "gpt-4o"})
    refused(openai.BadRequestError, "a tool that is not there", "tool_choice", tool_choice={"type": "function", "function": {"name": "f"}}, tools=[CITY])
    answer = client.chat.completions.create(model=model, messages=FRANCE, max_tokens=2, extra_body={"unknown": 1, "user": "x", "stop": None})
    check("errors: unknown fields and nulls are none", answer.usage.completion_tokens == 2, answer)


def headers(model):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=FRANCE, max_tokens=5, temperature=0, extra_headers={"X-Request-Id": "my-id", "X-Tandem-Timeline": "1"}
    )
    check("headers: the request's id comes back", raw.headers["x-request-id"] == "my-id", dict(raw.headers))
    timeline = json.loads(raw.headers["x-tandem-timeline"])
    check("headers: the timeline when asked for", timeline["stages"]["ttft_ms"] > 0, timeline)


def main():
    model = models()
    streams(model, chat(model))
    choices(model)
    completions(model)
    forms(model)
    tools(model)
    errors(model)
    headers(model)
    print(f"openai {openai.__version__}: all as expected")


main()
