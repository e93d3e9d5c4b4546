"""An adapter of edgepeft's, written in PEFT's format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgepeft import adapter, backbone, conv1d, peft_config
from edgepeft.errors import UsageError
from edgepeft.files import atomic_directory, write_json
from edgepeft.interop import folder as folders
from edgepeft.interop import readme, scales, structure
from edgepeft.methods import base


def write(folder: Path, target: Path) -> tuple[str, ...]:
    """Write the adapter in ``folder`` as PEFT's ``PeftModel.from_pretrained`` reads it, with a README that does so.

    The card goes along: PEFT has no place for the names of labels and for the precision of the backbone.

    Returns:
        What a user of the new folder should know.

    Raises:
        UsageError: PEFT's format has no place for this method or one of its options, or the method is not edgepeft's,
            or the adapter is none of the backbone that it names.
        EdgePeftError: the adapter is damaged.
    """
    card = adapter.read_card(folder)
    adapter.check_ours(card)
    tensors = folders.tensors(folder / adapter.TENSORS)
    method = base.create(card.method, card.options).finished()
    if method.name not in folders.FORMS:
        raise UsageError(
            f"An adapter of {card.method} cannot be written for PEFT.",
            "PEFT has no method that computes the same.",
            ("Merge it instead: edgepeft merge." if method.merges else "Export it instead: edgepeft export.")
            + f" These can be written: {', '.join(folders.FORMS)}.",
        )
    if method.packs_its_own:
        raise UsageError(
            "An adapter that began with LoftQ cannot be written for PEFT.",
            "It belongs to weights that were packed for it, and PEFT would put it on others.",
            "Merge it instead: edgepeft merge.",
        )
    form = folders.FORMS[method.name]
    made = structure.of(card.model, card.task, tensors)
    whole = structure.whole(tensors, made, norms=form is scales.LN_TUNING)
    transposed = conv1d.transposed(made.model)
    structure.complete(method, made)
    structure.check(made, tensors, whole, str(folder))
    written = form.write(method, {name: tensor for name, tensor in tensors.items() if name not in whole}, made)
    turned = transposed.intersection(written.settings.get("target_modules", ()))
    if turned and not form.transposed:
        raise UsageError(
            f"PEFT has no {form.kinds[0]} for {made.model.config.model_type}.",
            f"It cannot change the transposed linear layers of this architecture, such as {min(turned)}.",
            "Merge it instead: edgepeft merge.",
        )
    prefix = folders.prefix(form)
    named = {f"{'' if form.before_the_input else prefix}{name}": tensor for name, tensor in written.tensors.items()}
    named |= {prefix + name: tensors[name] for name in whole}
    config: dict[str, Any] = {
        "peft_type": form.kinds[0],
        "task_type": peft_config.TASKS[card.task],
        "base_model_name_or_path": backbone.resolve(card.model).location,
        "modules_to_save": sorted({structure.saved_module(name, made) for name in whole}) or None,
        "inference_mode": True,
        **written.settings,
        **({"fan_in_fan_out": True} if turned and form is not scales.LN_TUNING else {}),
    }
    with atomic_directory(target) as inside:
        folders.save(named, inside / peft_config.WEIGHTS)
        write_json(inside / peft_config.FILE, config)
        write_json(inside / adapter.CARD, asdict(card))
        (inside / "README.md").write_text(readme.of(card, made), encoding="utf-8")
    return written.notes
