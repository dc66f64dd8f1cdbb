"""Chat templates: which one a run uses, and the sandbox that renders it as transformers does."""

import json
import re
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

from minilora.errors import UserError
from minilora.files import read_json_if_present

# The form that Mistral-7B-Instruct was tuned with and OLLM trains on (arXiv 2410.23584): there is
# no space after [/INST]. The test for alternating turns is that of Mistral's own template.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the Mistral form wants user and assistant turns in alternation,"
    " user first') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def load_chat_template(name: str | None) -> str | None:
    """Return the text of the chat template that data.chat_template names.

    Args:
        name: "mistral" for the built-in form, a jinja file, or None for the model's own template.

    Returns:
        The template, or None for the model's own.

    Raises:
        UserError: there is no such file, or it is empty or not UTF-8.
    """
    if name is None:
        return None
    if name == "mistral":
        return MISTRAL_TEMPLATE
    if not Path(name).is_file():
        raise UserError(f"data.chat_template: {name!r} is neither 'mistral' nor a file")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        message = f"data.chat_template: {name!r} cannot be read as UTF-8 text: {error}"
        raise UserError(message) from error
    if not text.strip():
        raise UserError(f"data.chat_template: {name!r} is empty")
    return text


def find_chat_template(directory: Path, config: dict) -> str | None:
    """Return a model's own chat template, or None if it has none.

    Args:
        directory: of the model; its chat_template.jinja comes first.
        config: the content of tokenizer_config.json. Its "chat_template" may be one template, or
            several with names, of which "default" is used.

    Raises:
        UserError: chat_template.jinja is not UTF-8.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error

    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        return by_name.get("default")
    return template


def other_templates(directory: Path) -> list[str]:
    """Return the names of a model's chat templates beside the default one, such as "tool_use".

    They are in tokenizer_config.json, or are files of additional_chat_templates/.
    """
    files = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    names = [file.stem for file in files]
    template = read_json_if_present(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        names += [entry["name"] for entry in template if entry["name"] != "default"]
    return names


def write_bos_first(template: str, space_after: bool) -> str:
    """Return a chat template that writes BOS, and then what `template` writes.

    Args:
        template: the template, which writes no BOS itself.
        space_after: write a space after BOS.
    """
    # The line ends in a statement, after which the newline is dropped, so that `template` still
    # begins a line: only there is white space before a statement dropped too.
    return f"{{% if bos_token %}}{_bos_expression(space_after)}{{% endif %}}\n{template}"


def write_bos_if_missing(template: str, space_after: bool) -> str:
    """Return a chat template that writes BOS only where `template` does not begin with it.

    Args:
        template: the template, which writes BOS itself in some conversations.
        space_after: write a space after a BOS that `template` did not write.
    """
    # jinja drops a newline at the end of a template, but not before a statement; the empty
    # expression keeps other white space there, which it would drop before a statement
    body = re.sub(r"\r?\n\Z", "", template) + "{{ '' }}"
    # transformers would find the places of {% generation %} in the wrong text, and say nothing
    body = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", body)
    body = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", body)
    return (
        f"{{% set conversation_text %}}\n{body}{{% endset %}}\n"
        "{% if not conversation_text.startswith(bos_token) %}"
        f"{_bos_expression(space_after)}{{% endif %}}\n"
        "{{ conversation_text }}"
    )


def has_generation_marks(template: str) -> bool:
    """Return whether a chat template marks the assistant's text with `{% generation %}`."""
    return re.search(r"\{%[-+]?\s*generation\b", template) is not None


def _bos_expression(space_after: bool) -> str:
    """Return the expression of a template that writes BOS."""
    return "{{ bos_token + ' ' }}" if space_after else "{{ bos_token }}"


def make_environment() -> jinja2.Environment:
    """Return the sandboxed jinja environment that chat templates are written for.

    Its functions and options are those of transformers' `apply_chat_template`.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _tojson
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """Accept `{% generation %}` ... `{% endgeneration %}`, and render what it encloses.

    Some templates mark the assistant's text with this tag of transformers.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser):
        """Replace the tag by its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    """Let a template refuse a conversation."""
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    """Format the current date for a template."""
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Write a value as JSON without escaping HTML, which jinja's own filter does."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
