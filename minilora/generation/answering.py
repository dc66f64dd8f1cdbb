"""Answers to the rows of a file: from rows to prompts, and from finished answers to output rows.

`wanted_samples` lists the answers that a file of rows is to get, `Job.done` (jobs.py) holds those
that are finished, and `answer_samples` generates the others.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tqdm

from minilora import distributed
from minilora.config import DataConfig
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.generation.engine import Answer, stream
from minilora.generation.jobs import Job, Key, Row
from minilora.generation.prompting import PromptWriter
from minilora.generation.sampling import SamplingParams
from minilora.model.transformer import CausalLM


@dataclass
class TextGenerator:
    """A model, what writes its prompts, and the settings of decoding."""

    model: CausalLM
    writer: PromptWriter
    params: SamplingParams
    batch_size: int = 16
    """Answers decoded together."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.writer.tokenizer

    @property
    def data(self) -> DataConfig:
        """The form of its prompts."""
        return self.writer.data

    def stream(
        self, prompts: Sequence[Sequence[int]], indices: Sequence[int]
    ) -> Iterator[tuple[int, Answer]]:
        """Continue prompts, given as ids; see `engine.stream`."""
        return stream(self.model, prompts, self.tokenizer, self.params, indices, self.batch_size)

    def text_so_far(self, prompt: Sequence[int], answer: Answer) -> str:
        """Return the text of an answer to a prompt (ids), complete or not."""
        if answer.finish_reason is not None:
            return answer.text
        return self.tokenizer.decode_after(prompt, answer.ids)


@dataclass(frozen=True)
class Sample:
    """One of the answers that are wanted."""

    index: int
    """Its position among all of them. It decides the random draws of the answer."""
    row: Row
    """The row to be answered."""
    number: int | None
    """Which of the row's answers this is, from 0; None if the row gets only one."""

    @property
    def row_id(self) -> str | int:
        """The id of its row."""
        return self.row.values["id"]

    @property
    def key(self) -> Key:
        """What identifies the answer in the output."""
        return self.row_id, self.number or 0

    def output_row(self, text: str) -> dict:
        """Return the row of the output: the row's columns, the sample's number, and the answer."""
        columns = dict(self.row.values)
        for name in ("sample", "generated"):  # the input may be an earlier output
            columns.pop(name, None)
        if self.number is not None:
            columns["sample"] = self.number
        return {**columns, "generated": text}


def wanted_samples(rows: Sequence[Row], num_samples: int) -> list[Sample]:
    """List the answers that rows are to get, `num_samples` each, row by row."""
    samples = []
    for row_index, row in enumerate(rows):
        for number in range(num_samples):
            index = row_index * num_samples + number
            shown_number = number if num_samples > 1 else None
            samples.append(Sample(index, row, shown_number))
    return samples


def check_rows_unchanged(samples: Sequence[Sample], job: Job, source: str, output: str) -> None:
    """Check that no row has changed since an earlier run answered it.

    Args:
        samples: the answers that are wanted.
        job: the output, with the answers of earlier runs.
        source: the input file's name, for messages.
        output: the output file's name, for messages.

    Raises:
        UserError: a column has changed; the message names file, line and column.
    """
    for sample in samples:
        then = job.done.get(sample.key)
        if then is None:
            continue
        now = sample.output_row("")
        for name in now | then:
            if name != "generated" and _as_json(now, name) != _as_json(then, name):
                raise UserError(
                    f"{source}:{sample.row.number}: {name} changed since {output} was begun: "
                    "name another --output"
                )


def _as_json(row: dict, name: str) -> str | None:
    """Return a column as JSON text, so that NaN equals NaN; None if there is no such column."""
    return json.dumps(row[name]) if name in row else None


def note_long_prompts(prompts: Iterable[Sequence[int]], model: CausalLM) -> None:
    """Say so if some prompts (ids) are too long for the model."""
    longest = max(len(ids) for ids in prompts)
    max_positions = model.config.rope.get("max_position_embeddings")
    if max_positions and longest > max_positions:
        distributed.log(
            f"note: the longest prompt has {longest} tokens, "
            f"more than the {max_positions} positions the model was made for"
        )


def answer_samples(
    generator: TextGenerator,
    prompts: Mapping[str | int, Sequence[int]],
    todo: Sequence[Sample],
    job: Job,
) -> None:
    """Generate answers and add each to the job as soon as it is complete.

    All processes call this function together; each answers its share.

    Args:
        generator: the model, and how to decode.
        prompts: ids of each row's prompt, by the row's id.
        todo: the answers to generate.
        job: the output.
    """
    longest_first = sorted(todo, key=lambda sample: len(prompts[sample.row_id]), reverse=True)
    mine = longest_first[distributed.rank() :: distributed.world_size()]
    growing = generator.stream(
        [prompts[sample.row_id] for sample in mine], [sample.index for sample in mine]
    )

    num_tokens = 0
    num_cut = 0  # answers that reached max_new_tokens
    start = time.monotonic()
    is_quiet = distributed.rank() > 0
    with tqdm.tqdm(total=len(mine), desc="answering", unit=" rows", disable=is_quiet) as bar:
        for position, answer in growing:  # once for each new token
            num_tokens += 1
            if answer.finish_reason is None:
                continue
            if answer.finish_reason == "length":
                num_cut += 1
            job.add(mine[position].output_row(answer.text))
            speed = num_tokens / (time.monotonic() - start)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update()

    lists = distributed.gather_objects([num_cut])  # one list from each process
    total_cut = sum(sum(counts) for counts in lists)
    if total_cut:
        distributed.log(
            f"{total_cut} answers were cut off at {generator.params.max_new_tokens} tokens "
            "(--max_new_tokens)"
        )
