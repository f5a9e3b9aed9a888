"""The stages as commands, for clusters; each calls what the notebooks call (:mod:`.stages`), and opens what they have made."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Profile, load_profile, parse_settings
from .run.artifacts import plain, read_checked_json, write_table

_EPILOG = """\
Every command reads a profile (a name, or your own .toml file; default: $PATCHSAE_PROFILE, else openmoji) and writes into
runs/<profile>. What is there already, and was made with the same settings, is opened and not made again.

  python -m patchsae_utils doctor imagefolder                    what is there, what is missing, how long each stage takes here
  python -m patchsae_utils extract --profile imagenet            activations of the training images
  python -m patchsae_utils train --set training.n_tokens=200000 --set name=quick
  python -m patchsae_utils summarize --json                      one JSON object on standard output
  python -m patchsae_utils adapt --task openmoji/tools
  python -m patchsae_utils info runs/openmoji/sae                any SAE, store or artifact, of ours or of another program
  python -m patchsae_utils convert hf:owner/sae my_sae --format saelens

Exit status: 0 done; 1 an error, which standard error explains (or doctor found something missing); 2 unknown command or option; 130 interrupted.
"""
_LONG = 12  # entries of a list that ``info`` shows


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["notebooks"]:  # has options of its own
        from .reproduce import main as notebooks

        return notebooks(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        result = options.run(options)
    except (ValueError, OSError, ImportError, MemoryError) as error:  # what the package raises for bad input, and what a disk does
        print(f"error: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"error": str(error)}))
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    if int(os.environ.get("RANK", 0)) == 0:  # of several processes, one speaks
        print(json.dumps(result, default=plain) if options.json else _text(result))
    return 1 if result.get("missing") else 0


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    what = "PatchSAE's stages, one command each."
    parser = argparse.ArgumentParser(prog="python -m patchsae_utils", description=what, epilog=_EPILOG, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    # Shown in the help and in errors; main hands them on.
    commands.add_parser("notebooks", help="run the notebooks in order (the same as python -m patchsae_utils.reproduce)", add_help=False)
    for run in (_doctor, _extract, _train, _summarize, _sweep, _adapt, _ship, _info, _convert):
        name, first, rest = run.__name__[1:], *run.__doc__.split("\n", 1)
        text = "\n".join([first, *(line.removeprefix("    ") for line in rest.splitlines())])
        command = commands.add_parser(name, help=first, description=text, formatter_class=layout)
        command.set_defaults(run=run)
        said = "print one JSON object on standard output; progress goes to standard error"
        command.add_argument("--json", action="store_true", help=said)
        if run in (_info, _convert):
            command.add_argument("path", help="a folder, a file, or hf:<owner>/<repository>")
        else:
            said = "name or .toml file of the settings (default: $PATCHSAE_PROFILE, else openmoji)"
            optional: dict[str, Any] = {"nargs": "?"} if run is _doctor else {}
            command.add_argument("profile" if run is _doctor else "--profile", help=said, **optional)
            said = "change a setting; may be repeated"
            command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=said)
        if run is _convert:
            from .sae.formats import ALIASES, FORMATS

            command.add_argument("out", help="folder, or a .pt file for patchsae and saev")
            command.add_argument("--format", default="saelens", choices=[*FORMATS, *ALIASES], help="default: saelens, which is also ours")
        if run is _sweep:
            command.add_argument("--ks", default="1,2,5,10,20,50,100", help="numbers of latents, with commas (default: %(default)s)")
            command.add_argument("--choose", default="predicted,random", help="which latents, with commas (default: %(default)s)")
        if run is _adapt:
            command.add_argument("--task", action="append", metavar="SPEC", help="data set; may be repeated (default: adapters.tasks)")
            command.add_argument("--kind", help="which adapter (default: adapters.kind)")
    return parser


def _profile(options: argparse.Namespace) -> Profile:
    return load_profile(options.profile, parse_settings(";".join(options.set)))


def _world(options: argparse.Namespace, needs_text: bool = False):
    """The stages, the profile, its CLIP and layer."""
    from . import stages

    profile = _profile(options)
    clip, layer = stages.load_world(profile)
    if needs_text and not clip.has_text:
        raise ValueError(f"{options.command} needs a text tower, and {clip.name!r} has none. extract, train and summarize work without.")
    return stages, profile, clip, layer


def _doctor(options: argparse.Namespace) -> dict[str, Any]:
    """say what a profile finds on this machine, what is missing, and how long each stage takes

    Processors, GPU, memory and disk; model, weights and data; which stages are made. Then 32 images go through extraction, a few steps of training
    and statistics, in a folder that is gone afterwards, and each stage's time is estimated from that (training gets faster while latents grow
    sparse). Broken pictures are looked for by the stages themselves. Exit status 1 if something is missing."""
    from .doctor import examine

    return examine(_profile(options))


def _extract(options: argparse.Namespace) -> dict[str, Any]:
    """write the activations of the training images

    Residual-stream tokens of data.train after block model.layer, into runs/<profile>/activations. An interrupted run goes on behind the last
    whole shard. Sizes: 2 bytes a number, so 300 KB an image of ViT-B/16, 390 GB for ImageNet. On several GPUs, each of which writes its
    share of the shards: accelerate launch -m patchsae_utils extract ..."""
    stages, profile, clip, _ = _world(options)
    store = stages.training_store(profile, clip)
    return {"store": str(store.folder)} | store.describe().to_dict()


def _train(options: argparse.Namespace) -> dict[str, Any]:
    """train the SAE (extracts first, where that is missing)

    Settings: [sae] and [training] of the profile. A killed run goes on from its last checkpoint, bit for bit. On several GPUs:
    accelerate launch -m patchsae_utils train ..."""
    stages, profile, clip, _ = _world(options)
    sae = stages.trained_sae(profile, clip)
    facts = {"sae": str(profile.folder("sae")), "fingerprint": sae.fingerprint, "size": f"{sae.d_in} -> {sae.d_sae}"}
    return facts | sae.metadata.get("metrics", {})


def _summarize(options: argparse.Namespace) -> dict[str, Any]:
    """statistics of every latent (trains first, where that is missing)

    How often and how strongly each latent fires on data.statistics, its labels' entropy and reference images: runs/<profile>/latents and
    results/latents.csv. On several GPUs, each of which reads its share of the images: accelerate launch -m patchsae_utils summarize ...
    What was counted is saved every five minutes, and a killed run goes on from there."""
    stages, profile, clip, _ = _world(options)
    summary = stages.latent_summary(profile, clip, stages.trained_sae(profile, clip))
    path, alive = profile.folder("results") / "latents.csv", summary.frequency > 0
    write_table(path, summary.to_frame())
    median = float(summary.frequency[alive].median()) if alive.any() else None
    return {"table": str(path), "latents": len(alive), "alive": int(alive.sum()), "median_frequency_of_the_alive": median}


def _sweep(options: argparse.Namespace) -> dict[str, Any]:
    """zero-shot accuracy with the top k latents kept or removed

    On data.evaluation, with latents ranked on data.statistics: runs/<profile>/results/sweep.csv."""
    from .interventions import CHOICES, sweep_masks

    choose = options.choose.split(",")
    try:
        ks = [int(part) for part in options.ks.split(",")]
    except ValueError:
        raise ValueError(f"--ks takes numbers with commas between them, such as 1,10,100; got {options.ks!r}.") from None
    if unknown := set(choose) - set(CHOICES):  # before hours of training
        raise ValueError(f"--choose takes words with commas between them, of {', '.join(CHOICES)}; got {', '.join(sorted(unknown))}.")
    stages, profile, clip, layer = _world(options, needs_text=True)
    sae = stages.trained_sae(profile, clip)
    summary = stages.latent_summary(profile, clip, sae)
    table = sweep_masks(clip, sae, stages.evaluation_data(profile), ks=ks, choose=choose, layer=layer, class_counts=summary)
    path = profile.folder("results") / "sweep.csv"
    write_table(path, table)
    return {"table": str(path), "rows": table.to_dict("records")}


def _adapt(options: argparse.Namespace) -> dict[str, Any]:
    """adapt CLIP to tasks by learned prompts (MaPLe, CoOp)

    Few shots of each base class; one adapter a task and seed of [adapters]: runs/<profile>/adapters."""
    stages, profile, clip, _ = _world(options, needs_text=True)
    made = []
    for task in options.task or profile.adapters.tasks:
        for seed in profile.adapters.seeds:
            adapted = stages.adapter(profile, clip, task, options.kind, seed)
            accuracy = adapted.log[-1].get("accuracy") if adapted.log else None
            made.append({"task": task, "kind": adapted.kind, "seed": seed, "training_accuracy": accuracy})
    return {"adapters": made, "folder": str(profile.folder("adapters"))}


def _ship(options: argparse.Namespace) -> dict[str, Any]:
    """write the dictionary that ships with the package (for its maintainers)

    The default profile's SAE in float16, with statistics, names and embeddings, at most 8 MB: patchsae_utils/sae/openmoji_sae. What is missing is
    made first."""
    from .concepts.shipped import ship
    from .sae.files import SHIPPED

    stages, profile, clip, _ = _world(options)
    if not profile.is_default:
        raise ValueError(f"The default profile's dictionary ships, with its own settings; this profile is {profile.name!r}.")
    stages.trained_sae(profile, clip)  # not that which ships already
    return {"folder": str(SHIPPED), "megabytes": ship(stages.explorable(profile, clip), profile.name)}


def _convert(options: argparse.Namespace) -> dict[str, Any]:
    """write an SAE in another program's format

    The latents stay what they are. Not every format can say every activation; the error names those that can."""
    from .sae.files import load_sae, save_sae

    sae = load_sae(options.path)
    path = save_sae(sae, options.out, format=options.format)
    return {"written": str(path), "format": options.format, "activation": sae.activation, "d_in": sae.d_in, "d_sae": sae.d_sae}


def _info(options: argparse.Namespace) -> dict[str, Any]:
    """say what a checkpoint, store or other artifact is

    SAEs of any format, activation stores, and everything with a manifest. Reads descriptions, and checks what it can."""
    from .activations.folders import Folder, is_url
    from .activations.store import FORMAT, ActivationStore, read_manifest
    from .sae.files import read

    path = Path(options.path)
    if is_url(options.path):
        store = ActivationStore.open(options.path)
        return {"what": "activation store", **store.describe().to_dict(), "files": "checked when they are read"}
    folder = path.parent if path.name == "manifest.json" else path
    if (folder / "manifest.json").is_file() and not (folder / "cfg.json").is_file():
        manifest = read_checked_json(folder / "manifest.json")
        if manifest.get("format") != FORMAT:
            return {"what": "artifact", **_short(manifest)}
        if not read_manifest(Folder(folder))["complete"]:
            facts = {name: value for name, value in manifest.items() if name not in ("files", "complete")}
            return {"what": "activation store, unfinished", "files": len(manifest["files"]), **_short(facts)}
        store = ActivationStore.open(folder)
        store.verify()
        return {"what": "activation store", **store.describe().to_dict(), "files": "all whole, by their checksums"}
    sae, form, understood, ignored = read(options.path)
    norms = sae.W_dec.detach().norm(dim=1)
    facts = {
        "what": "sparse autoencoder", "format": form, **{name: getattr(sae, name) for name in ("activation", "k", "d_in", "d_sae")},
        "decoder_norms": [round(float(norms.min()), 4), round(float(norms.max()), 4)], "normalised_input": sae.normalizes,
        "fingerprint": sae.fingerprint, "reads": {key: value for key, value in sae.metadata.items() if key != "converted_from"},
        "understood": {key: value for key, value in understood.items() if key != "metadata"},
        "ignored": ", ".join(ignored) or None,
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


def _short(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its long lists counted."""
    long = {key: f"{len(value)} entries" for key, value in manifest.items() if isinstance(value, list | dict) and len(value) > _LONG}
    return {key: long.get(key) or (_short(value) if isinstance(value, dict) else value) for key, value in manifest.items()}


def _text(result: Any, indent: str = "") -> str:
    """A result for people: one line a fact, lists of records as a table."""
    lines = []
    for name, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            import pandas as pd

            lines.append(f"{indent}{name}:\n{pd.DataFrame(value).to_string(index=False)}")
        elif isinstance(value, list):
            lines.append(f"{indent}{name}: " + ("".join(f"\n{indent}  - {item}" for item in value) or "nothing"))
        else:
            lines.append(f"{indent}{name}:" + (f"\n{_text(value, indent + '  ')}" if isinstance(value, dict) else f" {value}"))
    return "\n".join(lines)
