"""The worked examples of docs/extending.md, put into a copy of the repository as the page says, train."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import make_pack, small_config

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "extending.md"
ROW = re.compile(r"^\| `([\w/]+\.py)` \| (.+?) \| `(.+)` \|$", re.MULTILINE)

TRY_OUT = """
import sys
from pathlib import Path
import torch
from orchestrator.config import load_config
from orchestrator.local import LocalRun
from orchestrator.planner import Case, cost_of
from strategies.codecs.base import NonFiniteError, PayloadError
from strategies.config import CodecConfig
from strategies.registry import build_codec, decode_payload

codec = build_codec(CodecConfig(name="fp16"))
values = torch.linspace(-3, 3, 1001)
payload = codec.encode(values)
assert payload.numel() == codec.num_bytes(1001)
assert torch.equal(decode_payload(payload, num_values=1001), values.half().float())
assert torch.equal(torch.cat([part for _, part in codec.decode_parts(payload, num_values=1001)]), values.half().float())
for wrong, error in ((lambda: codec.encode(values * 1e6), NonFiniteError),
                     (lambda: decode_payload(payload[:-1], num_values=1001), PayloadError)):
    try:
        wrong()
    except error:
        continue
    raise SystemExit("nothing was refused")

config = load_config("run.toml").config
assert (config.strategy.name, config.codec.name) == ("annealed", "fp16")
run = LocalRun(config, Path("run"))
run.start()
finished = run.run(max_turns=5000)
run.close()
losses = [evaluation.val_loss for evaluation in run.host.coordinator.state.evaluations]
assert finished.reason == "done" and losses[-1] < losses[0], losses
cost = cost_of("mine", config, Case(num_params=10**6, num_islands=2, link_bit_per_s=1e8, rtt_s=0.1, step_s=1.0))
assert cost.bytes_per_round > 2 * 10**6
print("trained", losses)
"""


def insert(source: Path, file: str, where: str, line: str) -> None:
    """Do what a row of the page's tables says."""
    path = source / file
    text = path.read_text()
    if where == "the imports":
        changed = re.sub(r"^from strategies\.", f"{line}\nfrom strategies.", text, count=1, flags=re.MULTILINE)
    elif match := re.fullmatch(r"the names of `(\w+)\.name`", where):
        begin = text.index(f"class {match[1]}")
        # The first list of names at or before the field: written in place, or as an alias above the class.
        place = text.find("name: Literal[", begin)
        following = text.find("\nclass ", begin + 1)
        if place < 0 or (following >= 0 and place > following):
            place = text.index("StrategyName = Literal[")
        opening = text.index("[", place) + 1
        changed = f"{text[:opening]}{line} {text[opening:]}"
    else:
        name = where.strip("`")
        changed = re.sub(rf"^({name}\b[^\n]*= \{{)$", rf"\1\n    {line}", text, count=1, flags=re.MULTILINE)
    assert changed != text, f"{file}: no place for {where}"
    path.write_text(changed)


@pytest.mark.timeout(120)
def test_both_examples_train_as_the_page_says(tmp_path: Path) -> None:
    page = PAGE.read_text()
    source = tmp_path / "source"
    for name in ("faults", "orchestrator", "strategies", "workers"):
        shutil.copytree(ROOT / name, source / name)  # what is compiled of it as well: it need not be again
    shutil.copytree(ROOT / "cluster_configs" / "runs", source / "cluster_configs" / "runs")
    blocks = re.findall(r"^```python\n# (strategies/[\w/]+\.py)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in blocks] == ["strategies/codecs/fp16.py", "strategies/annealed.py"]
    for name, code in blocks:
        assert not (source / name).exists()
        (source / name).write_text(code)
    rows = ROW.findall(page)
    assert len(rows) == 8
    for file, where, line in rows:
        insert(source, file, where, line)
    pack = make_pack(tmp_path)
    text = small_config(pack, "run.islands=2", "train.tokens=3840", "codec.backend=torch").to_toml()
    text = text.replace('name = "diloco"', 'name = "annealed"').replace('name = "fp32"', 'name = "fp16"')
    (tmp_path / "run.toml").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRY_OUT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("trained")
