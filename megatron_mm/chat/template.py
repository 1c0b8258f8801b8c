"""The chat template of exported directories: what render.py writes, in Jinja, for whoever serves them.

It renders conversations of several turns as training does, to the id: every earlier turn of the assistant with its
thought where the client sends one back, else with the empty thought, and tags in users' texts as
`ChatTokenizer.broken_tags` spells them. What it cannot do is tokenise an answer in pieces: a tag that the assistant
wrote as text is spelled as in a user's text when it is served again (docs/modes.md).
"""

from collections.abc import Iterable

from megatron_mm.chat import modes
from megatron_mm.chat.modes import TEMPLATE_NAMES, TRIGGERS, Mode
from megatron_mm.chat.tokenizer import IMAGE, TURN_END, TURN_START, ZERO_WIDTH_SPACE, longest_first

# Names in @...@ are replaced by Jinja literals. White space around the tags of Jinja is removed by their dashes.
_TEMPLATE = """
{%- set tags = @TAGS@ -%}
{%- macro plain(text) -%}
    {%- set spelled = namespace(text=text) -%}
    {%- for tag in tags -%}
        {%- set spelled.text = spelled.text | replace(tag, tag[0] ~ @BREAK@ ~ tag[1:]) -%}
    {%- endfor -%}
    {{- spelled.text -}}
{%- endmacro -%}

{%- set mode = thinking_mode | default(none) -%}
{%- if mode is not none and mode not in @MODES@ -%}
    {{- raise_exception('thinking_mode=' ~ mode ~ ': wanted is one of @MODE_NAMES@') -}}
{%- endif -%}
{%- set thinks = enable_thinking | default(none) -%}
{%- if thinks is not none -%}
    {%- if thinks is not boolean -%}
        {{- raise_exception('enable_thinking=' ~ thinks ~ ': wanted is true or false') -}}
    {%- endif -%}
    {%- set named = @LONG@ if thinks else @SHORT@ -%}
    {%- if mode is not none and mode != named -%}
        {{- raise_exception('thinking_mode=' ~ mode ~ ' and enable_thinking=' ~ thinks ~ ' contradict each other') -}}
    {%- endif -%}
    {%- set mode = named -%}
{%- endif -%}
{%- if tools is defined and tools -%}
    {{- raise_exception('tools: this model was not trained to call any') -}}
{%- endif -%}

{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('role ' ~ message.role ~ ': wanted is one of system, user, assistant') -}}
    {%- endif -%}
    {#- done: with tags spelled as text and images in their places; run: text since the last image -#}
    {%- set said = namespace(done='', run='') -%}
    {%- if message.content is string -%}
        {%- set said.run = message.content -%}
    {%- elif message.content -%}
        {%- for part in message.content -%}
            {%- if part is string -%}
                {%- set said.run = said.run ~ part -%}
            {%- elif part.type in ['text', 'input_text', 'output_text'] -%}
                {%- set said.run = said.run ~ part.text -%}
            {%- elif part.type in ['image', 'image_url', 'input_image'] and message.role == 'user' -%}
                {%- set said.done = said.done ~ plain(said.run) ~ @IMAGE@ ~ '\\n' -%}
                {%- set said.run = '' -%}
            {%- else -%}
                {{- raise_exception('a part of type ' ~ part.type ~ ' in a message of the ' ~ message.role) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- @TURN_START@ ~ message.role ~ '\\n' -}}
    {%- if message.role != 'assistant' -%}
        {{- said.done ~ plain(said.run) -}}
    {%- else -%}
        {%- if message.tool_calls -%}
            {{- raise_exception('tool_calls: this model was not trained to call any') -}}
        {%- endif -%}
        {%- set thought = message.reasoning_content or message.reasoning or message.thinking or '' -%}
        {%- if thought is not string -%}
            {{- raise_exception('reasoning of a message is not text') -}}
        {%- endif -%}
        {%- set said.thought = thought | trim -%}
        {%- set said.answer = said.run | trim -%}
        {%- set opens = said.answer.startswith(@THINK@) -%}
        {%- if opens or (not said.thought and @END_THINK@ in said.answer and @THINK@ not in said.answer) -%}
            {%- set pieces = (said.answer[@THINK@ | length:] if opens else said.answer).split(@END_THINK@) -%}
            {%- if pieces | length == 1 -%}
                {{- raise_exception('a message of the assistant holds a thought that does not end') -}}
            {%- endif -%}
            {%- if not said.thought -%}
                {%- set said.thought = pieces[:-1] | join(@END_THINK@) | trim -%}
            {%- endif -%}
            {%- set said.answer = pieces[-1] | trim -%}
        {%- endif -%}
        {%- if said.thought -%}
            {{- @THINK@ ~ @THOUGHT_START@ ~ plain(said.thought) ~ @THOUGHT_END@ ~ @END_THINK@ -}}
        {%- else -%}
            {{- @THINK@ ~ @EMPTY_THOUGHT@ ~ @END_THINK@ -}}
        {%- endif -%}
        {%- set pieces = said.answer.split(@ANSWER@) -%}
        {%- set inner = pieces[-1].split(@END_ANSWER@) -%}
        {%- if pieces | length == 2 and inner | length == 2 and not pieces[0] and not inner[1] -%}
            {{- @ANSWER@ ~ ' ' ~ plain(inner[0] | trim) ~ ' ' ~ @END_ANSWER@ -}}
        {%- else -%}
            {{- @AFTER_THINK@ ~ plain(said.answer) -}}
        {%- endif -%}
    {%- endif -%}
    {{- @TURN_END@ -}}
    {%- if add_generation_prompt or not loop.last -%}{{- '\\n' -}}{%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
    {{- @TURN_START@ ~ 'assistant\\n' ~ @TRIGGERS@[mode or @AUTO@] -}}
{%- endif -%}
"""


def chat_template(tags: Iterable[str]) -> str:
    """Return the template for a tokenizer.

    Its switches are `thinking_mode` ("auto", the default, "long", "short"), as R-4B has it, and `enable_thinking` (true
    is long, false is short), as Qwen3 has it. Anything else, or two that contradict each other, is an error.

    Args:
        tags: texts of the tokenizer's added tokens.
    """
    names = list(TEMPLATE_NAMES.values())
    literals = {
        "TAGS": longest_first(tags),
        "BREAK": ZERO_WIDTH_SPACE,
        "MODES": names,
        "LONG": TEMPLATE_NAMES[Mode.THINKING],
        "SHORT": TEMPLATE_NAMES[Mode.NON_THINKING],
        "AUTO": TEMPLATE_NAMES[Mode.AUTO],
        "TRIGGERS": {name: TRIGGERS[mode] for mode, name in TEMPLATE_NAMES.items()},
        **{"IMAGE": IMAGE, "TURN_START": TURN_START, "TURN_END": TURN_END},
        **{"THINK": modes.THINK, "END_THINK": modes.END_THINK, "EMPTY_THOUGHT": modes.EMPTY_THOUGHT},
        **{"THOUGHT_START": modes.THOUGHT_START, "THOUGHT_END": modes.THOUGHT_END, "AFTER_THINK": modes.AFTER_THINK},
        **{"ANSWER": modes.ANSWER, "END_ANSWER": modes.END_ANSWER},
    }
    # Python's literals of texts, lists and dictionaries of them are Jinja's as well.
    found = _TEMPLATE.replace("@MODE_NAMES@", ", ".join(names)).strip()
    for name, value in literals.items():
        found = found.replace(f"@{name}@", ascii(value))
    return found
