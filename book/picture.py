"""Draw the README's picture, book/static/table2.svg, from the shipped results of Table 2."""

from pathlib import Path

from amedlib import run
from amedlib.study import execute, figures, page, plans, published, uncertainty

TITLE = "ours: digits, 8x8"

if __name__ == "__main__":
    page.use_style()
    ours = uncertainty.estimates(execute.measure(plans.table2(), progress=False))
    theirs = published.paper_values("table2", "cifar10").rename(columns={"paper": "value"})
    figure = figures.against_nfe(
        {TITLE: ours, "the paper: CIFAR-10": theirs},
        ["FD (digits features)", "FID"],
        levels={TITLE: ("EDM, 79 NFE", run(plans.limit_run(), progress=False).value)},
    )
    # A white ground: GitHub shows pictures on dark pages too.
    target = Path(__file__).parent / "static" / "table2.svg"
    figure.savefig(target, facecolor="white", metadata={"Date": None})
