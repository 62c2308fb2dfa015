"""The model card that lies in every checkpoint."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

from rekd_train.data.summary import summary_notes, summary_rows
from rekd_train.inputs.policy import SelectionPolicy

_TEMPLATE = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
# {{ name }}

A pair of networks that classifies {{ modality }} from its own rationale: a *selector* keeps a few {{ features }}, a
*predictor* sees only those. Labels: {{ labels }}.

| part | family | layers | width | heads |
|---|---|---|---|---|
{% for role in ("selector", "predictor") %}
{% set part = description[role] %}
| {{ role }} | {{ part.family }} | {{ part.layers }} | {{ part.width }} | {{ part.heads }} |
{% endfor %}

How unselected {{ features }} are removed: `{{ description.operator }}`. Decision rule, noise-free: {{ rule }},
at least {{ policy.minimum }}.

## Data and weights
{% for origin in origins %}
- {{ origin }}
{% else %}
- not recorded
{% endfor %}
{% if data %}

| | {{ data.splits | join(" | ") }} |
|---|{% for _ in data.splits %}---|{% endfor %}

{% for row in summary_rows(data) %}
| {{ row | map("replace", "|", "\\\\|") | join(" | ") }} |
{% endfor %}

{% for note in summary_notes(data) %}
{{ "  - " if note.startswith(" ") else "- " }}{{ note.strip() }}
{% endfor %}
{% endif %}

## Figures
{% for key, value in figures %}
- {{ key }}: {{ value }}
{% else %}
- none measured
{% endfor %}

Load it: `rekd_train.load("THIS_DIRECTORY")`. Export it: `rekd-export THIS_DIRECTORY`.
"""
)


def model_card(description: dict[str, Any], policy: SelectionPolicy, metrics: dict[str, Any]) -> str:
    """Markdown text of the card, from what the checkpoint itself says."""
    training = description["training"]
    image = description["preprocessing"]["kind"] == "image"
    features = "patches" if image else "words"
    return _TEMPLATE.render(
        name=training.get("name", "REKD pair"),
        labels=", ".join(description["labels"]),
        description=description,
        modality="images" if image else "text",
        features=features,
        rule=_rule(policy, features),
        policy=policy,
        origins=training.get("origins", []),
        figures=list(_flat({key: value for key, value in metrics.items() if key != "data"})),
        data=metrics.get("data"),
        summary_rows=summary_rows,
        summary_notes=summary_notes,
    )


def _rule(policy: SelectionPolicy, features: str) -> str:
    if policy.bias is None:
        most = "all" if policy.budget is None else f"exactly {policy.budget} of the {features}, rounded down"
        return f"the highest scores, {most}"
    limit = "no upper limit" if policy.budget is None else f"at most {policy.budget} of the {features}"
    return f"score plus bias {policy.bias} above 0, {limit}"


def _flat(metrics: dict[str, Any], prefix: str = ""):
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif key == "never_predicted" and value:
            yield f"{prefix}{key}", ", ".join(value)
        elif not isinstance(value, list):
            yield f"{prefix}{key}", round(value, 4) if isinstance(value, float) else value
