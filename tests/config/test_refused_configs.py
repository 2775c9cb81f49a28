"""Invalid configuration files are refused in one helpful line."""

import re

import pytest

from pipeline.config.catalog import VARIANTS
from pipeline.config.loader import load_config
from pipeline.errors import ConfigError
from tests.support.configs import SMALLEST, TOKEN

# What is added to the smallest file -> what the refusal must say: the key, the value, what is allowed.
BROKEN = {
    "train: {lerning_rate: 1.0e-4}": ("train.lerning_rate", "unknown", "learning_rate"),
    "trian: {}": ("trian", "unknown", "'train'"),
    "train: {lora: {r: 8}}": ("train.lora.r", "unknown", "here it is called train.lora.rank"),
    "quantize: {variants: [{name: int4, groupsize: 32}]}": ("variants.0.groupsize", "unknown", "'group_size'"),
    "train: {method: dora}": ("train.method", "dora", "'qlora', 'lora' or 'full'"),
    "train: {schedule: step}": ("train.schedule", "step", "cosine"),
    "train: {epochs: 0}": ("train.epochs", "0", "greater than 0"),
    "train: {epochs: true}": ("train.epochs", "true", "number"),
    "train: {batch_size: yes}": ("train.batch_size", "true", "number"),
    "train: {batch_size: 0}": ("train.batch_size", "0", "greater than or equal to 1"),
    "train: {batch_size: 1.5}": ("train.batch_size", "1.5", "integer"),
    "train: {batch_size: four}": ("train.batch_size", "four", "integer"),
    "train: {max_steps: -1}": ("train.max_steps", "-1", "greater than or equal to 1"),
    "train: {seed: -1}": ("train.seed", "-1", "greater than or equal to 0"),
    "train: {seed: 4294967296}": ("train.seed", "4294967296", "less than"),
    "train: {learning_rate: .nan}": ("train.learning_rate", "NaN", "finite"),
    "train: {learning_rate: .inf}": ("train.learning_rate", "Infinity", "finite"),
    "train: {learning_rate: -0.1}": ("train.learning_rate", "-0.1", "greater than 0"),
    "train: {learning_rate: fast}": ("train.learning_rate", "fast", "number"),
    "train: {lora: {alpha: .inf}}": ("train.lora.alpha", "Infinity", "finite"),
    "train: {lora: {alpha: .nan}}": ("train.lora.alpha", "NaN", "finite"),
    "train: {lora: {alpha: true}}": ("train.lora.alpha", "true", "number"),
    "train: {lora: {dropout: 1}}": ("train.lora.dropout", "1", "less than 1"),
    "train: {lora: {dropout: no}}": ("train.lora.dropout", "false", "number"),
    "train: {lora: {target_modules: [q_proj, lm_head]}}": ("train.lora.target_modules", "lm_head", "cannot be trained"),
    "train: {lora: {target_modules: '(q_proj'}}": ("train.lora.target_modules", "no regular expression", "as a list"),
    "train: {lora: {target_modules: []}}": ("train.lora.target_modules", "[]", "all-linear"),
    "train: {warmup: false}": ("train.warmup", "false", "number"),
    "train: {packing: perhaps}": ("train.packing", "perhaps", "boolean"),
    "train:": ("train", "null", "dictionary"),
    "train: [epochs]": ("train", "[", "dictionary"),
    "merge: {base: fp8}": ("merge.base", "fp8", "'auto', 'nf4' or 'bf16'"),
    "evaluate: {max_tokens: 10}": ("evaluate.max_tokens", "10", "256"),
    "evaluate: {max_tokens: true}": ("evaluate.max_tokens", "true", "number"),
    "evaluate: {prompts: Hello}": ("evaluate.prompts", "Hello", "list"),
    "quantize: {variants: [int3]}": ("quantize.variants.0", "int3", "int8, int8-dynamic, int4"),
    "quantize: {variants: 4}": ("quantize.variants", "4", "list"),
    "quantize: {variants: [{group_size: 32}]}": ("quantize.variants.0.name", "missing"),
    "quantize: {variants: [{name: int4, group_size: 48}]}": ("quantize.variants.0", "48", "32, 64, 128, 256"),
    "quantize: {variants: [{name: int4, group_size: true}]}": ("variants.0.group_size", "true", "number"),
    "quantize: {variants: [{name: int8, group_size: 48}]}": ("quantize.variants.0", "48", "32, 64, 128, 256"),
    "quantize: {variants: [{name: int8, embeddings: int4}]}": ("quantize.variants.0", "embeddings", "int8"),
    "quantize: {variants: [{name: int4, rounding: nearly}]}": (
        "quantize.variants.0",
        "nearly",
        ", ".join(VARIANTS["int4"].roundings),
    ),
    "quantize: {variants: [{name: int4, packing: marlin}]}": ("quantize.variants.0", "marlin", "plain, tile_packed"),
    "quantize: {variants: [{name: int8, packing: plain}]}": ("quantize.variants.0", "packing", "one way"),
    "quantize: {variants: [int4, {name: int4, group_size: 32}]}": ("quantize.variants", "once"),
    "publish: {repo: name-without-user}": ("publish.repo", "name-without-user", "USER/NAME"),
    "publish: {repo: user/name.git}": ("publish.repo", "user/name.git", "USER/NAME"),
    "publish: {repo: user/name-}": ("publish.repo", "user/name-", "USER/NAME"),
    "publish: {repo: user/na--me}": ("publish.repo", "user/na--me", "USER/NAME"),
    "publish: {repo: user/na/me}": ("publish.repo", "user/na/me", "USER/NAME"),
    "publish: {repo: user/modèle}": ("publish.repo", "user/modèle", "USER/NAME"),
    "publish: {repo: |\n    user/name\n  }": ("not valid YAML",),
    'publish: {repo: "user/name\\n"}': ("publish.repo", "user/name", "control character"),
    "publish: {commits: many}": ("publish.commits", "many", "per_stage"),
    "track: {project: 'my project'}": ("track.project", "my project", "pattern"),
    "1: 2": ("1", "strings"),
}


@pytest.mark.parametrize("addition", BROKEN)
def test_invalid_value_names_file_key_value_and_allowed_values(refusal, addition):
    message = refusal(SMALLEST + addition + "\n")
    assert "run.yaml" in message
    for part in BROKEN[addition]:
        assert part in message


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("name: demo", "nmae: demo", "nmae: unknown key; did you mean 'name'? (and 1 more)"),
        ("data: {source: tickets.jsonl}\n", "", "null makes a run without training"),
        ("name: demo", "name: my run", "no spaces"),
        ("name: demo", "name: ../up", "no spaces"),
        ("name: demo", 'name: "demo\\n"', "control character"),
        ("name: demo", "name: " + "x" * 97, "xxx..."),
        ("name: demo", "name: 7", "string"),
        ("{source: user/model}", "{source: ''}", "at least 1 character"),
        ("{source: user/model}", "{source: package:llm/../x.gguf}", "package:NAME/FILE.gguf"),
        ("{source: user/model}", "{source: user/model, revision: ''}", "model.revision"),
        ("{source: user/model}", "user/model", "model"),
        ("{source: tickets.jsonl}", "{source: t, form: alpaca}", "messages"),
        ("{source: tickets.jsonl}", "{source: t, held_out: 1}", "0.9"),
        ("{source: tickets.jsonl}", "{source: t, held_out: .nan}", "data.held_out"),
        ("{source: tickets.jsonl}", "{source: t, limit: 0}", "data.limit"),
        ("{source: tickets.jsonl}", "{source: t, template_options: [a]}", "data.template_options"),
        ("{source: tickets.jsonl}", "{source: t, template_options: {a: [1]}}", "data.template_options.a"),
        ("{source: tickets.jsonl}", "{source: t, template_options: {a-b: 1}}", "data.template_options.a-b"),
        ("{source: tickets.jsonl}", "{}", "source or sources: neither is set. Try: one of them"),
        ("{source: tickets.jsonl}", "{source: t, sources: [{source: u}]}", "source or sources: both are set"),
        ("{source: tickets.jsonl}", "{sources: [t]}", "data.sources.0"),
        ("{source: tickets.jsonl}", "{sources: [{weight: 2}]}", "data.sources.0.source: missing"),
        (
            "{source: tickets.jsonl}",
            "{sources: [{source: t, weights: 2}]}",
            "weights: unknown key; did you mean 'weight'?",
        ),
        ("{source: tickets.jsonl}", "{sources: [{source: t, weight: 0}]}", "data.sources.0.weight: 0 is refused"),
        ("{source: tickets.jsonl}", "{sources: [{source: t, weight: .inf}]}", "data.sources.0.weight"),
        ("{source: tickets.jsonl}", "{sources: [{source: t, limit: 0}]}", "data.sources.0.limit"),
        ("{source: tickets.jsonl}", "{sources: [{source: t}], form: text}", "form: belongs to one of the sources"),
        ("{source: tickets.jsonl}", "{sources: [{source: t}], split: test}", "split: belongs to one of the sources"),
        ("{source: tickets.jsonl}", "{sources: [{source: t}, {source: t}]}", "t: named twice. Try: another split"),
        ("{source: tickets.jsonl}", "{source: t, validation: {source: t}}", "t: named twice"),
        ("{source: tickets.jsonl}", "{source: t, validation: {split: test}}", "data.validation.source: missing"),
        ("{source: tickets.jsonl}", "{source: t, held_out: 0.1, validation: {source: u}}", "held_out: not used beside"),
    ],
)
def test_the_required_parts_are_checked_too(refusal, old, new, said):
    assert said in refusal(SMALLEST.replace(old, new))


def test_further_mistakes_are_counted(refusal):
    assert refusal(SMALLEST + "train: {epochs: -1, batch_size: -1, seed: -1}\n").endswith("(and 2 more)")


@pytest.mark.parametrize("text", [SMALLEST + "name: again\n", SMALLEST + "train:\n  epochs: 1\n  epochs: 2\n"])
def test_a_key_that_stands_twice_is_refused_with_its_line(refusal, text):
    assert re.search(rf"run\.yaml:{len(text.splitlines())}: .*occurs twice", refusal(text))


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "mapping"),
        ("- a\n- b\n", "mapping"),
        ("just words\n", "mapping"),
        (SMALLEST + "\ttrain: 1\n", "run.yaml:4: not valid YAML"),
        (SMALLEST + "train: {epochs: 1\n", "not valid YAML"),
        (SMALLEST + "train: *nowhere\n", "undefined alias"),
        (SMALLEST + "--- \nname: second\n", "another document"),
        (SMALLEST + "train: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (SMALLEST + "train: {max_steps: !!int many}\n", "not valid YAML"),
        (SMALLEST + "train: {packing: !!bool perhaps}\n", "does not fit its tag"),
        (SMALLEST + "train: {max_steps: !!int ''}\n", "does not fit its tag"),
        (SMALLEST.replace("user/model", "user/model, revision: 2024-02-30"), "day is out of range"),
        (SMALLEST + f"train: {{max_steps: {'9' * 5000}}}\n", "not valid YAML"),
        ("[" * 20_000, "too deeply"),
        (SMALLEST.encode() + b"\x00", "not valid YAML"),
        (SMALLEST.encode("utf-16"), "UTF-8"),
        (SMALLEST.encode() + "# café\n".encode("latin-1"), "UTF-8"),
    ],
)
def test_non_mapping_yaml_is_refused(refusal, text, said):
    assert said in refusal(text)


def test_aliases_that_expand_without_end_are_refused_at_once(refusal):
    levels = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]  # 9 ** 30 elements
    text = SMALLEST.replace("name: demo", f"name: [{', '.join(levels)}]")
    assert 'name: [["x", "x", "x", "x", ...], [[...], [...], [...], [...], ...]' in refusal(text)
    assert "evaluate.prompts" in refusal(SMALLEST + "evaluate: {prompts: &again [*again]}\n")
    assert "train.lora" in refusal(SMALLEST + "train: &again {lora: *again}\n")


@pytest.mark.parametrize(
    "setting, said",
    [
        ("train.epochs", "key=value"),
        ("=3", "key=value"),
        ("train.epochs=[", "not valid YAML"),
        ("train.epochs=" + "[" * 20_000, "too deeply"),
        ("model.revision=2024-02-30", "not valid YAML"),
        ("train.epochs.x=1", "'epochs' is a value"),
        ("train.epoch=2", "did you mean 'epochs'"),
        ("quantize.variants.0.rounding=rtn", "is a value, not a section"),
        ("train={epochs: 1, epochs: 2}", "occurs twice"),
    ],
)
def test_a_setting_that_cannot_be_applied_is_refused(refusal, setting, said):
    assert said in refusal(SMALLEST + "train: {epochs: 1}\nquantize: {variants: [int8]}\n", setting)


@pytest.mark.parametrize("missing", ["nowhere.yaml", "", "/", "nowhere\0.yaml", "x" * 5000])
def test_a_file_that_cannot_be_read_is_refused_and_the_recipes_named(missing):
    with pytest.raises(
        ConfigError, match="no such configuration file. Try: a path, or one of .*demo|cannot be read"
    ) as caught:
        load_config(missing)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "text, settings",
    [
        (SMALLEST + f"publish: {{repo: {TOKEN}}}\n", []),
        (SMALLEST + f"publish: {{token: {TOKEN}}}\n", []),
        (SMALLEST + f"{TOKEN}: 1\n", []),
        (SMALLEST + f"evaluate: {{prompts: {{token: {TOKEN}}}}}\n", []),
        (SMALLEST + f"x: [{TOKEN}: }}\n", []),
        (SMALLEST + f"{TOKEN}: 1\n{TOKEN}: 2\n", []),
        (SMALLEST, [f"publish.repo={TOKEN}"]),
        (SMALLEST, [TOKEN]),
        (SMALLEST, [f"publish.repo={'x' * 60}-{TOKEN}: ]"]),
    ],
)
def test_pasted_token_is_not_echoed(refusal, text, settings):
    message = refusal(text, *settings)
    assert not any(TOKEN[i : i + 8] in message for i in range(3, len(TOKEN) - 8))
