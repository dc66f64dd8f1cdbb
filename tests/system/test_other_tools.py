"""coming-from.md answers every option of other tools, and says what is true of them."""

import dataclasses
import importlib.metadata
import inspect
import re
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from transformers import tokenization_utils_tokenizers
from transformers.models.auto import auto_factory, tokenization_auto

from helpers.documents import ROOT, table_rows, text_of
from minilora.config import Config

COMING = ROOT / "docs/coming-from.md"
ARGUMENTS = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}


def names_of_others(heading: str) -> list[str]:
    """Return the names in backticks in the left column of a table of coming-from.md."""
    found = []
    for left, _ in table_rows(COMING, heading):
        found += re.findall(r"`(\w+\*?)`", left)
    return found


def covers(name: str, option: str) -> bool:
    """Return whether a name of the page, which may end in `*`, stands for an option."""
    if name.endswith("*"):
        return option.startswith(name[:-1])
    return name == option


def read_keywords(function: object, *methods: str) -> set[str]:
    """Return the keyword arguments that a function takes by kwargs.pop(...), by its source."""
    pattern = rf'kwargs\.(?:{"|".join(methods)})\(\s*"([a-z]\w*)"'
    return set(re.findall(pattern, inspect.getsource(function)))  # type: ignore[arg-type]


def parameters_of(function: object) -> set[str]:
    """Return the names of a function's parameters, without self and kwargs."""
    names = inspect.signature(function).parameters  # type: ignore[arg-type]
    return set(names) - {"self", "kwargs", "model_args", "init_inputs", "args"}


PRETRAINED = transformers.PreTrainedModel.from_pretrained
MODEL_ARGUMENTS = parameters_of(PRETRAINED) | read_keywords(PRETRAINED, "pop")
MODEL_ARGUMENTS |= {"code_revision"} & set(
    re.findall(r"\w+", inspect.getsource(auto_factory._BaseAutoModelClass.from_pretrained))
)

GENERATION = set(vars(transformers.GenerationConfig()))
GENERATION -= {"_from_model_config", "transformers_version"}

PEFT_FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}
QUANTIZATION = parameters_of(transformers.BitsAndBytesConfig)

LAUNCH = {action.dest for action in launch_command_parser()._actions}
LAUNCH -= {"help", "training_script", "training_script_args"}
LAUNCH |= {field.name for field in dataclasses.fields(ClusterConfig)}


def accelerate_variables() -> set[str]:
    """Return the environment variables that accelerate's source has as whole strings."""
    found: set[str] = set()
    pattern = r'"((?:ACCELERATE|FSDP|PARALLELISM_CONFIG)_\w*[A-Z0-9])"'
    for path in Path(accelerate.__file__).parent.rglob("*.py"):
        found |= set(re.findall(pattern, text_of(path)))
    return found


@pytest.mark.parametrize(
    ("heading", "options"),
    [
        ("transformers: TrainingArguments", ARGUMENTS),
        ("transformers: from_pretrained() of a model", MODEL_ARGUMENTS),
        ("transformers: BitsAndBytesConfig", QUANTIZATION),
        ("transformers: generate() and GenerationConfig", GENERATION),
        ("peft: LoraConfig", PEFT_FIELDS),
        ("accelerate: launch and its YAML", LAUNCH),
        ("accelerate: environment variables", accelerate_variables()),
    ],
)
def test_every_option_of_a_library_is_told_once(heading: str, options: set[str]):
    names = names_of_others(heading)
    assert len(names) == len(set(names))
    unknown = [name for name in names if not any(covers(name, option) for option in options)]
    assert unknown == []
    missing = [option for option in options if not any(covers(name, option) for name in names)]
    assert sorted(missing) == []


def test_names_of_tokenizers_and_of_peft_exist():
    tokenizer = transformers.PreTrainedTokenizerBase
    known = set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    known |= read_keywords(tokenizer.__init__, "pop", "get")
    known |= read_keywords(tokenization_utils_tokenizers, "pop", "get", "setdefault")
    known |= read_keywords(tokenization_auto.AutoTokenizer.from_pretrained, "pop", "get")
    known |= parameters_of(tokenizer.__call__) | parameters_of(tokenizer.apply_chat_template)
    found = names_of_others("transformers: tokenizers")
    assert set(found) - known == set()
    assert {"use_fast", "padding_side", "model_max_length", "trust_remote_code"} <= set(found)

    load = peft.PeftModel.from_pretrained
    known = parameters_of(load) | read_keywords(load, "pop", "get") | set(dir(peft))
    known |= set(dir(peft.PeftModel)) | set(dir(peft.tuners.lora.LoraModel))
    assert set(names_of_others("peft: PeftModel and functions")) - known == set()
    assert set(parameters_of(load)) <= set(names_of_others("peft: PeftModel and functions"))


def test_the_page_tells_the_versions_that_are_installed():
    for name in ("transformers", "peft", "accelerate"):
        told = re.search(rf"{name}\s+(\d+\.\d+)", text_of(COMING).split("compares the names")[1])
        assert told
        assert importlib.metadata.version(name).startswith(f"{told[1]}.")


def test_names_that_are_gone_and_names_of_trl():
    gone = set(names_of_others("Names of transformers 4 that 5 has not"))
    assert gone & ARGUMENTS == set()
    trl = names_of_others("trl: SFTConfig and SFTTrainer")
    assert len(trl) > 15
    assert set(trl) & ARGUMENTS == set(), "what trl inherits belongs to transformers' table"


# all keys of the files in its config/ and config_lora/, and the flags of its scripts (2025-09)
YAML_TRAINER = """
activate adapter_path adapter_save_type add_bos_token_when_response_start
add_eos_token_when_response_end amp_training attn_implementation batch_size bias bit bos_token_id
checkpoint_type cls_token_id common config cpu_offload data_path data_train_type data_verbose
ddp_timeout deepspeed_config del_logits_after_forward deterministic device dtype
early_stop_criterion efficient_load ema_updating eos_token_id epochs fast_validation_n
fast_validation_step_interval fsdp_hyperparameters fsdp_layer_cls fsdp_train generation_max_time
gpu_test gradient_accumuate_step gradient_checkpointing half_inference include_path
inference_result_verbose is_greedy is_multi_turn limit load_model_type local_rank lora_alpha
lora_dropout lr0 lrf max_length metrics min_num_params mode model model_cache_dir model_size
momentum name optimizer_step_criterion pad_token_id peft_config_path port project quant_config r
resume_model_dir save_model_dir saved_model_dir scheduler_type seed sep_token_id size_based stage
steps target_modules task_type tasks template_dir template_path tensorboard_logging_interval
total_cpu_use train_verbose training_stage transformer_based type unk_token_id
use_huggingface_trainer user_prompt_masking_start_step validation_step_interval_prop warmup_epochs
warmup_momentum warmup_steps weight_decay workers wrap_policy
""".split()


def test_every_name_of_the_yaml_trainer_is_told_once():
    assert sorted(names_of_others("YAML: universal-llm-trainer")) == YAML_TRAINER


def test_the_price_course_and_ollm_are_told():
    course = [left for left, _ in table_rows(COMING, "course: price prediction with QLoRA")]
    for name in ('device_map="auto"', 'eval_strategy="no"', "REVISION", "set_seed(42)", "LORA_R"):
        assert any(name in left for left in course), name
    ollm = [left for left, _ in table_rows(COMING, "OLLM: config and scripts")]
    assert len(ollm) >= 10


def sections_of_others() -> list[str]:
    """Return the headings of coming-from.md above a table of names."""
    return re.findall(r"^## (\w+: .*)$", text_of(COMING), re.MULTILINE)


def all_answers() -> list[str]:
    """Return the right columns of all tables of names in coming-from.md."""
    headings = [*sections_of_others(), "Names of transformers 4 that 5 has not"]
    return [right for heading in headings for _, right in table_rows(COMING, heading)]


def test_every_name_of_others_has_an_answer():
    answers = all_answers()
    assert len(answers) >= 300
    assert all(answers)
    for answer in answers:  # what is missing has its reason
        assert not answer.startswith("not here") or re.match(r"not here: .{5,}", answer), answer


def test_settings_that_are_here_alone_answer_no_name_of_others():
    _, _, text = text_of(COMING).partition("\n## Here alone\n")
    alone = re.findall(r"`([\w.]+)`", text)
    assert len(alone) >= 2
    for answer in all_answers():
        assert not any(f"`{setting}`" in answer for setting in alone), answer


def test_the_contents_of_coming_from_lead_to_every_table():
    contents, _, _ = text_of(COMING).partition("\n## ")
    linked = set(re.findall(r"\]\(#([\w-]+)\)", contents))
    headings = sections_of_others()
    assert len(headings) >= 12
    for heading in headings:
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        assert anchor in linked, heading


def test_defaults_of_others_that_are_told():
    defaults = {f.name: f.default for f in dataclasses.fields(transformers.TrainingArguments)}
    betas = (defaults["adam_beta1"], defaults["adam_beta2"])
    assert (*betas, defaults["adam_epsilon"]) == (0.9, 0.999, 1e-8)
    assert defaults["average_tokens_across_devices"] is True
    assert defaults["logging_nan_inf_filter"] is True
    parameters = inspect.signature(transformers.BitsAndBytesConfig).parameters
    assert parameters["bnb_4bit_quant_type"].default == "fp4"
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    assert (*optimizer.defaults["betas"], optimizer.defaults["eps"]) == (0.9, 0.999, 1e-8)


def test_own_defaults_that_are_told():
    ours = Config()
    assert (ours.lora.rank, ours.lora.alpha) == (32, 16)
    assert (ours.train.learning_rate, ours.train.warmup_steps) == (1e-5, 100)
    assert ours.train.epochs == 2.0
    assert ours.train.lr_scheduler == "constant_with_warmup"
    assert ours.train.group_by_length is True
    assert ours.train.gradient_checkpointing is True
    assert ours.hub.private is True
    assert ours.model.double_quant is True
