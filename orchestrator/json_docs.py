"""Writes docs/reference/json.md from the models: `python -m orchestrator.json_docs > docs/reference/json.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from orchestrator import answers
from orchestrator.pipeline.views import PipelineLedger, PipelineStatus
from orchestrator.planning import Plan
from orchestrator.status import Status
from orchestrator.storm.figures import StormFigures
from orchestrator.summary import Summary

# Command line (as far as it decides about the output) -> model.
OUTPUTS: Mapping[str, type[BaseModel]] = {
    "atoll train --json": Summary,
    "atoll demo --json": Summary,
    "atoll status --json": Status,
    "atoll status runs/swarm --json": PipelineStatus,
    "atoll ledger --json": answers.LedgerAnswer,
    "atoll ledger runs/swarm --json": PipelineLedger,
    "atoll runs --json": answers.RunsHere,
    "atoll runs --at auto --json": answers.RunsThere,
    "atoll pause --json": answers.Asked,
    "atoll resume --json": answers.Asked,
    "atoll save --json": answers.SaveAsked,
    "atoll set codec.name=int4 --json": answers.SettingsSet,
    "atoll rollback --to 12 --json": answers.RolledBackTo,
    "atoll unban island-1 --json": answers.Unbanned,
    "atoll stop --json": answers.Stopped,
    "atoll logs --json": answers.LogTail,
    "atoll stack island-0 --json": answers.StackDump,
    "atoll submit debug --json": answers.Submitted,
    "atoll bundle --json": answers.Bundled,
    "atoll doctor --json": answers.Checks,
    "atoll up --json": answers.ClusterUp,
    "atoll plan demo --json": Plan,
    "atoll config show demo --origin --json": answers.ConfigAnswer,
    "atoll report --json": answers.Written,
    "atoll export --out exported --json": answers.Exported,
    "atoll sample --prompt def --json": answers.Sampled,
    "atoll dashboard --json": answers.DashboardLink,
    "atoll data pack texts --out packs/mine --json": answers.Packed,
    "atoll data verify packs/mine --json": answers.Packed,
    "atoll join 10.0.0.1:4321 --json": answers.ClusterJoined,
    "atoll leave --json": answers.Left,
    "atoll config presets --json": answers.Presets,
    "atoll config validate demo --json": answers.Valid,
    "atoll why --json": answers.WhyLines,
    "atoll chaos kill:island-1 --json": answers.Injected,
    "atoll storm --json": StormFigures,
    "atoll simulate --json": answers.Simulated,
    "atoll simulate --seed 7 --json": answers.SimulatedOne,
    "atoll lab up two-regions --json": answers.LabUp,
    "atoll lab status --json": answers.LabAnswer,
}

HEAD = """# JSON

What commands print with `--json`, one object (or list) on standard output; with `--watch` one a line. Written from the
models (`OUTPUTS` in `orchestrator/json_docs.py`) by `python -m orchestrator.json_docs`; a test checks that this page
is current, and every command passes what it prints through its model. Fields may be added; a change of meaning raises
`schema_version` where there is one. Errors are text on standard error, with the exit code.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command, model in OUTPUTS.items():
        parts.append(f"## `{command}`\n\n{_section(model)}")
    parts.append(f"## What `notify.command` gets\n\n{_section(answers.NotifyEvent)}")
    return "\n".join(parts)


def _section(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    told = (model.__doc__ or "").strip().splitlines()[0]
    lines = [told, ""]
    for name, part in [("", schema), *schema.get("$defs", {}).items()]:
        fields = part.get("properties")
        if fields:
            lines += [f"{name}:", ""] if name else []
            lines += ["| field | type | what |", "|---|---|---|"]
            lines += [f"| {key} | {_type(value)} | {_text(value)} |" for key, value in fields.items()]
            lines.append("")
    lines += [
        "<details><summary>schema</summary>",
        "",
        "```json",
        json.dumps(schema),
        "```",
        "",
        "</details>",
    ]
    return "\n".join(lines) + "\n"


def _text(field: Mapping[str, Any]) -> str:
    return str(field.get("description", "")).replace("|", "\\|").replace("\n", " ")


def _type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_type(part) for part in field["anyOf"])
    if "const" in field:
        return json.dumps(field["const"])
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_type(field.get('items', {}))}"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"object of {_type(field['additionalProperties'])}"
    return kind


if __name__ == "__main__":
    print(page(), end="")
