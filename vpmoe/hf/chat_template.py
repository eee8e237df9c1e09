"""The Harmony chat template of an export: ``tokenizer.apply_chat_template`` gives the renderer's ids.

Messages are ``{"role", "content"}``, of the assistant with a ``channel`` (``final`` where none is given), or with
``thinking``, which becomes a message of its own on the channel ``analysis``; before the user's last message there is
none of that any more, as in training and in ``vpmoe chat``. A conversation that begins with the user's message gets the
system and developer messages of ``vpmoe.harmony.prompts``; keyword arguments named as that class's fields change them,
and ``default_prompts=False`` leaves them out. An export of a model that was taught under other texts begins with those
instead, of one that was taught under none with the user's message, as long as no keyword argument asks for something
else. What the format has no place for is refused: tools,
other roles and channels, and contents that spell a special token, which a template cannot keep from becoming one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from vpmoe.harmony.conversation import CHANNELS, ROLES
from vpmoe.harmony.prompts import REASONING_EFFORTS, Prompts
from vpmoe.tokenizer.o200k_harmony import NAMED_SPECIAL_TOKENS

RESERVED = "<|reserved_"
"""How a thousand special tokens of o200k Harmony begin that have no name."""
SPECIALS = (*NAMED_SPECIAL_TOKENS, RESERVED)
_PROMPTS = Prompts()
_FIELDS = {
    "model_identity": _PROMPTS.model_identity,
    "knowledge_cutoff": _PROMPTS.knowledge_cutoff,
    "conversation_start_date": _PROMPTS.conversation_start_date,
    "reasoning_effort": _PROMPTS.reasoning_effort,
    "valid_channels": list(_PROMPTS.valid_channels),
    "developer_instructions": _PROMPTS.developer_instructions,
}
_SETTINGS = "\n".join(
    f"{{%- set given_{name} = {name} if {name} is defined else {json.dumps(default)} -%}}"
    for name, default in _FIELDS.items()
)
_ANY_GIVEN = " or ".join(f"{name} is defined" for name in _FIELDS)

_TEMPLATE = r"""
{#- Harmony: <|start|>role[<|channel|>channel]<|message|>content<|end|>; a last final message ends in <|return|>. -#}
{%- macro write(role, channel, content, end) -%}
    {%- if content is not string -%}
        {{- raise_exception("the content of a message of role " ~ role ~ " is no text") -}}
    {%- endif -%}
    {%- for special in @SPECIALS@ -%}
        {%- if special in content -%}
            {{- raise_exception("a message of role " ~ role ~ " spells the special token " ~ special) -}}
        {%- endif -%}
    {%- endfor -%}
    {{- "<|start|>" ~ role ~ ("<|channel|>" ~ channel if channel else "") ~ "<|message|>" ~ content ~ end -}}
{%- endmacro -%}

{%- if tools -%}
    {{- raise_exception("tools: this model was not taught to call any") -}}
{%- endif -%}

{%- set bare = messages[0]["role"] == "user" and (default_prompts is not defined or default_prompts) -%}
{%- if not bare and (@ANY_GIVEN@) -%}
    {{- raise_exception("the conversation has its own system or developer message, or default_prompts is off; write there what the keyword arguments say") -}}
{%- endif -%}
@SETTINGS@
{%- set taught = @TAUGHT@ -%}
{%- if bare and taught is not none and not (@ANY_GIVEN@) -%}
    {%- for role in ["system", "developer"] if taught[role] -%}
        {{- write(role, "", taught[role], "<|end|>") -}}
    {%- endfor -%}
{%- elif bare -%}
    {%- if given_reasoning_effort not in @EFFORTS@ -%}
        {{- raise_exception("reasoning_effort is " ~ given_reasoning_effort ~ "; use one of " ~ @EFFORTS@ | join(", ")) -}}
    {%- endif -%}
    {%- set cutoff = "Knowledge cutoff: " ~ given_knowledge_cutoff if given_knowledge_cutoff else "" -%}
    {%- set date = "Current date: " ~ given_conversation_start_date if given_conversation_start_date else "" -%}
    {%- set head = [given_model_identity, cutoff, date] | select | join("\n") -%}
    {%- set channels = "" -%}
    {%- if given_valid_channels -%}
        {%- set channels = "# Valid channels: " ~ given_valid_channels | join(", ") ~ ". Channel must be included for every message." -%}
    {%- endif -%}
    {{- write("system", "", [head, "Reasoning: " ~ given_reasoning_effort, channels] | select | join("\n\n"), "<|end|>") -}}
    {%- if given_developer_instructions -%}
        {{- write("developer", "", "# Instructions\n\n" ~ given_developer_instructions, "<|end|>") -}}
    {%- endif -%}
{%- endif -%}

{%- set asked = namespace(last=0) -%}
{%- for message in messages if message["role"] == "user" -%}
    {%- set asked.last = asked.last + 1 -%}
{%- endfor -%}
{%- set turn = namespace(now=0) -%}
{%- for message in messages -%}
    {%- set role = message["role"] -%}
    {%- set turn.now = turn.now + (1 if role == "user" else 0) -%}
    {%- if role not in @ROLES@ -%}
        {{- raise_exception("role " ~ role ~ " is none of " ~ @ROLES@ | join(", ")) -}}
    {%- endif -%}
    {%- if message["tool_calls"] -%}
        {{- raise_exception("tool_calls: this model was not taught to call any") -}}
    {%- endif -%}
    {%- if role != "assistant" -%}
        {%- if message["channel"] or message["thinking"] -%}
            {{- raise_exception("a message of role " ~ role ~ " has no channel and no thinking") -}}
        {%- endif -%}
        {{- write(role, "", message["content"], "<|end|>") -}}
    {%- else -%}
        {%- set channel = message["channel"] or "final" -%}
        {%- if channel not in @CHANNELS@ -%}
            {{- raise_exception("channel " ~ channel ~ " is none of " ~ @CHANNELS@ | join(", ")) -}}
        {%- endif -%}
        {%- if message["thinking"] -%}
            {%- if channel != "final" -%}
                {{- raise_exception("thinking beside a message on the channel " ~ channel) -}}
            {%- endif -%}
            {%- if turn.now == asked.last -%}
                {{- write(role, "analysis", message["thinking"], "<|end|>") -}}
            {%- endif -%}
        {%- endif -%}
        {%- if channel == "final" or turn.now == asked.last -%}
            {{- write(role, channel, message["content"], "<|return|>" if loop.last and channel == "final" else "<|end|>") -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if messages[-1]["role"] != "user" -%}
        {{- raise_exception("a prompt ends with the user's message, this one with the " ~ messages[-1]["role"] ~ "'s") -}}
    {%- endif -%}
    {{- "<|start|>assistant" -}}
{%- endif -%}
"""  # noqa: E501


def chat_template(taught: Mapping[str, str | None] | None, specials: Iterable[str] = SPECIALS) -> str:
    """The template, a Jinja text.

    Args:
        taught: texts of the ``system`` and ``developer`` messages to begin with, None for a message that there is not;
            None for ``vpmoe.harmony.prompts``'s.
        specials: how the vocabulary's special tokens begin, which no content may spell.
    """
    texts = taught and {role: text for role, text in taught.items() if text}
    words = {
        "@SPECIALS@": json.dumps(list(specials)),
        "@EFFORTS@": json.dumps(REASONING_EFFORTS),
        "@ROLES@": json.dumps(ROLES),
        "@CHANNELS@": json.dumps(CHANNELS),
        "@ANY_GIVEN@": _ANY_GIVEN,
        "@SETTINGS@": _SETTINGS,
        # Jinja knows no JSON null; a text last, whatever it spells.
        "@TAUGHT@": "none" if texts is None else json.dumps(texts, ensure_ascii=False),
    }
    text = _TEMPLATE.strip()
    for word, value in words.items():
        text = text.replace(word, value)
    return text + "\n"
