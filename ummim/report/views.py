"""The page's pictures: reconstructions over the epochs, masks over the token grid, the encoder's health."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from safetensors import SafetensorError

from ummim.data import Batch
from ummim.errors import UserError
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.replay import tinted
from ummim.report import health
from ummim.report.charts import Line, line_chart
from ummim.report.html import esc, heading, legend, named, note, section, size_text
from ummim.report.masks import PLANS, TokenShares, token_shares
from ummim.report.pictures import gallery, jpeg, shaded
from ummim.report.read import Run
from ummim.run_config import RunConfig
from ummim.visualize import KEPT, SECONDARY, THROWN, VISIBLE

COLOURS = {"visible": VISIBLE, "secondary": SECONDARY, "kept": KEPT, "thrown": THROWN}
BUDGET = 6_000_000  # characters of all galleries
EXAMPLES = 2


@dataclass(frozen=True)
class Subject:
    """A run's typed recipe with some images of its kind, or why there is none."""

    run: Run
    recipe: Recipe | None = None
    batch: Batch | None = None
    source: str = ""
    why_not: str = ""


def subject(run: Run, shards: str | None) -> Subject:
    """Read a run's recipe and its fixed images."""
    try:
        recipe = load_recipe(str(run.folder / "recipe.yaml"), (), RunConfig)
        if not isinstance(recipe, Recipe):
            return Subject(run, why_not="is no pre-training")
        batch, source = health.fixed_images(recipe, run.environment.get("shard_digest"), shards)
    except (UserError, OSError, ValueError) as error:
        return Subject(run, why_not=f"has no recipe that can be used ({error})")
    return Subject(run, recipe, batch, source)


def reconstructions(runs: Sequence[Run]) -> str:
    """A gallery for each run that has figures."""
    parts = []
    having = [run for run in runs if run.figures]
    for i, run in enumerate(runs):
        if not run.figures:
            parts.append(f"<div>{heading(i, run.label)}{note('No reconstructions.')}</div>")
            continue
        frames, broken = gallery(run.figures, BUDGET // len(having))
        text = f"{len(frames)} of {len(run.figures)} figures, {size_text(sum(len(frame.uri) for frame in frames))}"
        text += f", at most {max(frame.size[0] for frame in frames)} pixels wide" if frames else ""
        text += f"; cannot be read: {', '.join(broken)}" if broken else ""
        images = "".join(
            f'<img src="{frame.uri}" alt="epoch {frame.epoch}" width="{frame.size[0]}" height="{frame.size[1]}"'
            f"{'' if number == len(frames) - 1 else ' hidden'}>"
            for number, frame in enumerate(frames)
        )
        last = len(frames) - 1
        slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="epoch">'
        head = f'<div class="control">{heading(i, run.label)}{slider}<output></output></div>'
        if frames:
            parts.append(f'<div class="gallery">{head}{images}{note(text + ".")}</div>')
        else:
            parts.append(f"<div>{heading(i, run.label)}{note(text + '.', bad=True)}</div>")
    return section("reconstructions", "Reconstructions", f'<div class="columns">{"".join(parts)}</div>')


def masks(subjects: Sequence[Subject]) -> str:
    """Maps of the token grid, once for runs with the same masks, and plans laid over images."""
    parts = [note(_shares_text())]
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, each in enumerate(subjects):
        if each.recipe is None:
            parts.append(heading(i, each.run.label) + note(f"No masks: this run {each.why_not}."))
            continue
        recipe = each.recipe
        same = (recipe.method.mask_grid(recipe.data.image_size), recipe.mask, recipe.throw_ratio, recipe.seed)
        groups.setdefault(same, []).append(i)
    for numbers in groups.values():
        names = "&emsp;".join(named(i, subjects[i].run.label) for i in numbers)
        parts.append(f"<h3>{names}</h3>{_maps(subjects[numbers[0]])}")
    return section("masks", "Masks and thrown tokens", *parts)


def encoder_health(subjects: Sequence[Subject]) -> str:
    """Effective rank and attention distance, of the newest checkpoint and over those that are kept."""
    ranks, heads, over, notes = list[Line](), list[Line](), list[Line](), list[str]()
    for i, each in enumerate(subjects):
        found = list(_looks(each, notes))
        if not found:
            continue
        newest, label = found[-1], each.run.label
        ranks.append(Line(label, i, [(b + 1, rank) for b, rank in enumerate(newest.ranks)]))
        over.append(Line(label, i, [(look.step, look.ranks[-1]) for look in found]))
        flat = [(b + 1.0, value) for b, block in enumerate(newest.distances) for value in block]
        if flat and each.recipe is not None:
            heads.append(Line(label, i, flat, dots=True))
            heads.append(_even(each.recipe, i, len(newest.distances)))
        text = f"{label}: step {newest.step}, {health.IMAGES} images of {each.source}"
        widths = " to ".join(str(width) for width in dict.fromkeys((min(newest.widths), max(newest.widths))))
        notes.append(f"{text}; blocks of {widths} channels, which bound the rank.")
        if not newest.distances:
            notes.append(f"{label}: attention distance is not drawn: windows or pooling bound it in this encoder.")
    charts = _charts(ranks, heads, over)
    body = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    names = legend([each.run.label for each in subjects])
    return section("health", "Encoder", names, body, *(note(text) for text in notes))


def _charts(ranks: Sequence[Line], heads: Sequence[Line], over: Sequence[Line]) -> list[str]:
    wanted = []
    if ranks:
        wanted.append(("Effective rank of the features, by block", ranks, "block"))
    if heads:
        wanted.append(("Mean attention distance of each head (pixels)", heads, "block"))
    if any(len(line.points) > 1 for line in over):
        wanted.append(("Effective rank of the last block, by checkpoint", over, "step"))
    return [
        f"<figure><figcaption><h3>{esc(title)}</h3></figcaption>{line_chart(lines, x, from_zero=True, name=title)}"
        "</figure>"
        for title, lines, x in wanted
    ]


def _looks(each: Subject, notes: list[str]) -> Iterator[health.Health]:
    """The checkpoints that can be looked into, oldest first; notes tell of others."""
    if each.batch is None:
        notes.append(f"{each.run.label}: not looked into: this run {each.why_not}.")
        return
    if not each.run.checkpoints:
        notes.append(f"{each.run.label}: no checkpoint to look into yet.")
    for checkpoint in each.run.checkpoints:
        if checkpoint.wrong:
            notes.append(f"{each.run.label}: {checkpoint.path.name} is passed over: {checkpoint.wrong}.")
    for checkpoint in health.looked_into(each.run.checkpoints):
        if not checkpoint.path.exists():
            continue  # the run goes on, and has removed it meanwhile
        try:
            yield health.look(checkpoint, each.batch)
        except (UserError, OSError, SafetensorError, RuntimeError) as error:
            notes.append(f"{each.run.label}: {checkpoint.path.name} cannot be looked into: {error}")


def _even(recipe: Recipe, number: int, blocks: int) -> Line:
    """The distance of attention that is the same everywhere, for comparison."""
    grid = recipe.method.mask_grid(recipe.data.image_size)
    even = float(health.patch_distances(grid, recipe.data.image_size // grid[0]).mean())
    return Line("even attention", number, [(1, even), (blocks, even)], thin=True)


def _maps(each: Subject) -> str:
    assert each.recipe is not None and each.batch is not None
    figures = [_map(part, shares) for part, shares in token_shares(each.recipe).items()]
    pictures = list(tinted(each.batch))
    for number in range(EXAMPLES):
        picture = jpeg(pictures[number * len(pictures) // EXAMPLES])
        caption = f"<figcaption><h3>Example {number + 1}</h3></figcaption>"
        figures.append(f'<figure>{caption}<img src="{picture}" alt="a plan over an image"></figure>')
    text = f"Examples: fixed masks on images of {each.source}."
    if each.recipe.method.attention is not None:
        text += " The maps are of the plans before the first attention maps; from then on masks follow the images."
    return f'<div class="maps">{"".join(figures)}</div>{note(text)}'


def _map(part: str, shares: TokenShares) -> str:
    share = shares.share
    full = max(2 * share.mean(), share.max())
    red, green, blue = COLOURS[part]
    mark = f'<span style="color: rgb({red} {green} {blue})"><span class="key"></span></span>'
    text = f"{share.mean():.1%} of the plans; by token {share.min():.1%} to {share.max():.1%}"
    return (
        f"<figure><figcaption><h3>{mark}{esc(part)}</h3></figcaption>"
        f'<img class="tiles" src="{shaded(share, COLOURS[part], full)}" alt="{esc(part)}: share by token">'
        f'<p class="quiet">{esc(text)} (chance: ±{shares.deviation:.1%})</p></figure>'
    )


def _shares_text() -> str:
    return (
        f"How often each token of the grid has a part, over {PLANS} plans drawn as in training: the stronger the "
        "colour, the more often. Chance: one standard deviation of a token's share, if all tokens fared alike."
    )
