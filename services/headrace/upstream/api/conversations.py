"""Translate a conversation, its tools and the variables of its chat template to OpenAI's API."""

from __future__ import annotations

import json
from typing import Any

from headrace.checks.conversations import arguments_of_call, parameters_of_tool
from headrace.template_arguments import FIELD, arguments_of
from headrace.upstream.api.strict import strict_schema
from headrace.upstream.api.terms import Api, Terms, lacks, unsupported
from headrace.v1 import generation_pb2 as pb

_MODES = {
    pb.TOOL_MODE_AUTO: "auto",
    pb.TOOL_MODE_NONE: "none",
    pb.TOOL_MODE_REQUIRED: "required",
}
_EFFORT = "reasoning_effort"


def chat_body(chat: pb.Chat, terms: Terms) -> dict[str, Any]:
    """Return the parameters for a conversation. Raises InvalidRequest."""
    api = terms.api
    body: dict[str, Any] = {
        "messages": [_message(message, place, api) for place, message in enumerate(chat.messages)]
    }
    if chat.tools:
        body |= _tools(chat, api)
    if chat.HasField("template_arguments"):
        body |= _arguments(chat, api)
    if chat.continue_final_message:
        if api == "openai":
            raise unsupported("chat.continue_final_message")
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _message(message: pb.Message, place: int, api: Api) -> dict[str, Any]:
    # "developer" is treated as "system", as the contract says, and OpenAI treats "system" as "developer".
    role = "system" if message.role == "developer" else message.role
    calls = message.tool_calls
    # An answer that consists of calls has no content.
    turn: dict[str, Any] = {"role": role, "content": message.content or (None if calls else "")}
    if role == "tool":
        if message.tool_call_id:
            turn["tool_call_id"] = message.tool_call_id
        elif api == "openai":
            field = f"chat.messages[{place}].tool_call_id"
            raise lacks(field, "is empty, but the service behind this tier needs it")
    if calls:
        turn["tool_calls"] = [_call(call, place, number) for number, call in enumerate(calls)]
    if message.name and not (role == "tool" and api == "openai"):  # whose API has no name there
        turn["name"] = message.name
    if message.reasoning and api != "openai":  # whose API does not take back what the model thought
        turn["reasoning" if api == "vllm" else "reasoning_content"] = message.reasoning
    return turn


def _call(call: pb.ToolCall, place: int, number: int) -> dict[str, Any]:
    arguments_of_call(call, place, number)  # checks them
    return {
        "id": call.id or f"call_{place}_{number}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments or "{}"},
    }


def _tools(chat: pb.Chat, api: Api) -> dict[str, Any]:
    tools = [_tool(tool, place, api) for place, tool in enumerate(chat.tools)]
    body: dict[str, Any] = {"tools": tools}
    choice = chat.tool_choice
    if choice.HasField("name"):
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        if api == "llama.cpp":  # which knows the modes only
            body["tools"] = [tool for tool in tools if tool["function"]["name"] == choice.name]
            body |= {"tool_choice": "required", "parallel_tool_calls": False}
    elif (mode := _MODES.get(choice.mode)) is not None:
        body["tool_choice"] = mode
    if chat.HasField("parallel_tool_calls"):
        body.setdefault("parallel_tool_calls", chat.parallel_tool_calls)
    return body


def _tool(tool: pb.Tool, place: int, api: Api) -> dict[str, Any]:
    parameters = parameters_of_tool(tool, place)
    function: dict[str, Any] = {"name": tool.name, "parameters": parameters}
    if tool.description:
        function["description"] = tool.description
    if api == "openai":
        # Most tools have optional arguments, which strict mode does not have: their schema is a hint then.
        strict = strict_schema(parameters)
        function |= {"parameters": strict or parameters, "strict": strict is not None}
    return {"type": "function", "function": function}


def _arguments(chat: pb.Chat, api: Api) -> dict[str, Any]:
    """Return the variables of the template. OpenAI's API has one of them, as a parameter of its own."""
    arguments = arguments_of(chat.template_arguments)
    if not arguments:
        return {}
    if api != "openai":
        return {"chat_template_kwargs": arguments}
    effort = arguments.pop(_EFFORT, None)
    if arguments or not isinstance(effort, str):
        name = json.dumps(next(iter(arguments), _EFFORT))
        raise lacks(FIELD, f"sets {name}, but the service behind this tier has no such variable")
    return {_EFFORT: effort}
