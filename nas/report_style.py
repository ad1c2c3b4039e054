"""The look of the report: two palettes, light and dark, and one style sheet over them.

Shares kept are veneers, from maple to walnut; scores run from paper to deep blue; children are told apart by hue and by shape,
with hues of Okabe and Ito's colour-blind safe set. Both sequences are ordered by lightness, so they read without hue.
"""

from __future__ import annotations

Palette = dict[str, str]

LIGHT: Palette = {
    "paper": "#fbfaf7",
    "card": "#ffffff",
    "ink": "#24211c",
    "muted": "#6d675c",
    "rule": "#e6e1d6",
    "grid": "#efebe2",
    "accent": "#c2410c",
    "warn": "#fdf3e1",
    "optimum": "#6b3fa0",
    "pool": "#2667a8",
    "path": "#0b7a65",
    "swap": "#b07a00",
    "variant": "#b0447f",
    "base": "#6d675c",
    "fixed": "#b9b1a1",
    "attention": "#2667a8",
    "ffn": "#c58a3c",
    "kv": "#0b8a72",
    "reserve": "#d9d3c7",
    "k1": "#f2e4ca",
    "k2": "#e0c294",
    "k3": "#c8995f",
    "k4": "#94602f",
    "k5": "#5d3a1f",
    "on-low": "#2b1d10",
    "on-high": "#fdf8ee",
}
DARK: Palette = {
    "paper": "#171613",
    "card": "#1f1d1a",
    "ink": "#ece7dc",
    "muted": "#a59e90",
    "rule": "#37332c",
    "grid": "#2b2823",
    "accent": "#ff8a54",
    "warn": "#33291a",
    "optimum": "#c4a1f0",
    "pool": "#7fb4ec",
    "path": "#4fc9ac",
    "swap": "#e8b94a",
    "variant": "#ee94c2",
    "base": "#a59e90",
    "fixed": "#7d7669",
    "attention": "#5b93cf",
    "ffn": "#d9a55c",
    "kv": "#3fae95",
    "reserve": "#4b463d",
    "k1": "#3b2e20",
    "k2": "#5a4127",
    "k3": "#7f5a31",
    "k4": "#c08f52",
    "k5": "#efcf99",
    "on-low": "#f6ecda",
    "on-high": "#23180c",
}
SCORES = {  # from low to high; in between, colours are mixed
    "light": ("#f3f1e8", "#c5dcd9", "#7fb2bf", "#3d7ea6", "#1f4e82", "#161a44"),
    "dark": ("#24282d", "#1f4152", "#2a6680", "#4f9bab", "#9dcfc2", "#f4f6d9"),
}


def style_sheet(levels: int, panes: int) -> str:
    """The whole style sheet, for so many levels of scores and so many panes of the map."""
    light, dark = (
        _variables(palette, ramp(SCORES[name], levels)) for palette, name in ((LIGHT, "light"), (DARK, "dark"))
    )
    chosen = ",".join(f"#map-{i}:checked~.map .pane-{i}" for i in range(panes)) or ".pane"
    scores = "".join(f".s{i}{{fill:var(--s{i})}}" for i in range(levels))
    theme = f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f"{theme}{SHEET}{scores}{chosen}{{display:block}}"


def ramp(anchors: tuple[str, ...], levels: int) -> list[str]:
    """`levels` colours from the first anchor to the last, mixed in RGB between neighbours."""
    colours = []
    for index in range(levels):
        at = index / max(1, levels - 1) * (len(anchors) - 1)
        left = min(int(at), len(anchors) - 2)
        pairs = zip(_channels(anchors[left]), _channels(anchors[left + 1]), strict=True)
        colours.append("#" + "".join(f"{round(a + (b - a) * (at - left)):02x}" for a, b in pairs))
    return colours


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _variables(palette: Palette, scores: list[str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in palette.items()) + "".join(
        f"--s{index}:{colour};" for index, colour in enumerate(scores)
    )


SHEET = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1240px;margin:0 auto;padding:36px 24px 64px}
h1,h2{font-family:ui-serif,"Iowan Old Style",Charter,"Source Serif 4",Georgia,"Liberation Serif",serif;font-weight:600;letter-spacing:-.01em;line-height:1.2}
h1{font-size:32px;margin:0 0 6px}
h2{font-size:18.5px;margin:0 0 2px}
.eyebrow{color:var(--muted);font-size:13px;letter-spacing:.06em;text-transform:uppercase;margin:0 0 6px}
.lead{font-size:17px;margin:0;max-width:78ch}
.facts,.aside{color:var(--muted);font-size:13px;margin:8px 0 0}
.formula{font-size:12.5px;color:var(--muted);margin:10px 0 0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:1px;background:var(--rule);border:1px solid var(--rule);border-radius:10px;overflow:hidden;margin:22px 0}
.tile{background:var(--card);padding:13px 16px}
.tile b{display:block;font-size:22px;font-weight:600;line-height:1.25}
.tile span{color:var(--muted);font-size:12.5px;display:block}
.warning{background:var(--warn);border-left:3px solid var(--accent);border-radius:4px;padding:9px 14px;margin:10px 0}
.cards{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:20px}
figure{background:var(--card);border:1px solid var(--rule);border-radius:10px;margin:0;padding:18px 20px 16px;min-width:0}
figure.wide{grid-column:1/-1}
figcaption{color:var(--muted);font-size:13.5px;margin:0 0 12px}
.notes{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:20px;margin-top:20px}
.absent{background:none;border-style:dashed}
.absent h2{font-size:15.5px;color:var(--muted)}
.absent figcaption{margin:0}
svg{display:block;overflow:visible}
svg.fluid{width:100%;height:auto}
text{fill:var(--ink);font-size:11px}
.tick{fill:var(--muted);font-size:10.5px}
.label{fill:var(--muted);font-size:11.5px}
.name,.total{font-size:11.5px;paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.total{font-size:10.5px;fill:var(--muted)}
.strong{font-weight:650}
text.strong{fill:var(--ink)}
.grid{stroke:var(--grid)}
.axis{stroke:var(--muted);stroke-width:.8}
.break{stroke:var(--muted);stroke-width:.8;stroke-dasharray:1 4}
.front{fill:none;stroke:var(--ink);stroke-width:1.4;stroke-opacity:.55}
.diagonal{stroke:var(--muted);stroke-dasharray:5 4}
.limit{stroke:var(--accent);stroke-width:1.4;stroke-dasharray:5 3}
.limit-text{fill:var(--accent);font-size:11px}
.o-parent{color:var(--ink)}.o-child{color:var(--accent)}.o-optimum{color:var(--optimum)}.o-pool{color:var(--pool)}.o-path{color:var(--path)}
.o-swap{color:var(--swap)}.o-variant{color:var(--variant)}.o-base{color:var(--base)}.o-other{color:var(--muted)}
.mark path{fill:currentColor;stroke:var(--card);stroke-width:.8}
.mark.cross path{fill:none;stroke:currentColor;stroke-width:1.6}
.mark.ring path{fill:none;stroke:var(--ink);stroke-width:1.2}
.mark.o-pool path,.mark.o-swap path,.mark.o-path path{fill-opacity:.8}
.mark:hover path{stroke:var(--ink);stroke-width:1.4}
.error{stroke:currentColor;stroke-width:1.2}
.curve{fill:none;stroke:currentColor;stroke-width:1.6}
.curve.o-child{stroke-width:2.2}
.band{fill:currentColor;fill-opacity:.16}
.loss{fill:none;stroke:var(--muted);stroke-opacity:.5;stroke-width:1}
.b-fixed{fill:var(--fixed)}.b-attention{fill:var(--attention)}.b-ffn{fill:var(--ffn)}.b-kv{fill:var(--kv)}.b-reserve{fill:var(--reserve)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:3px 16px;margin:10px 0 0;padding:0;font-size:12.5px;color:var(--muted)}
.legend li{display:flex;align-items:center;gap:6px}
.map{display:flex}
.rows{flex:none}
.scroll{overflow-x:auto;min-width:0;flex:1}
.scroll:focus-visible,.pick:focus-visible+label{outline:2px solid var(--accent);outline-offset:2px}
.pick{position:absolute;opacity:0}
.pick+label{display:inline-block;margin:0 6px 12px 0;padding:3px 11px;border:1px solid var(--rule);border-radius:99px;font-size:12.5px;color:var(--muted);cursor:pointer}
.pick:checked+label{color:var(--ink);border-color:var(--ink)}
.pane{display:none}
.cell text{font-size:10.5px}
.cell.k0{fill:none;stroke:var(--muted);stroke-opacity:.55;stroke-dasharray:2 2}
.cell.k1{fill:var(--k1)}.cell.k2{fill:var(--k2)}.cell.k3{fill:var(--k3)}.cell.k4{fill:var(--k4)}.cell.k5{fill:var(--k5)}
.cell.k-unknown{fill:var(--grid)}
.cell.k0 text{fill:var(--muted);stroke:none}
.cell.k1 text,.cell.k2 text,.cell.k3 text{fill:var(--on-low)}
.cell.k4 text,.cell.k5 text{fill:var(--on-high)}
.p-track{fill:var(--grid)}.p-bf16{fill:var(--fixed)}.p-fp8{fill:var(--pool)}.p-int8{fill:var(--ink)}.p-nvfp4{fill:var(--path)}.p-nvfp4a16{fill:var(--swap)}
.p-int4{fill:var(--optimum)}.p-int4-g32{fill:var(--variant)}.p-other{fill:var(--muted)}
.s-own{fill:none;stroke:var(--rule)}
.chosen{fill:none;stroke:var(--accent);stroke-width:2}
.bar{display:flex;flex-wrap:wrap;align-items:center;gap:4px 20px}
.bar svg.fluid{width:400px}
table{border-collapse:collapse;width:100%;font-size:13.5px;margin:4px 0 14px}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--rule);font-weight:400;white-space:nowrap}
thead th{color:var(--muted);font-size:12px}
th:first-child{text-align:left}
tr.strong th,tr.strong td{font-weight:650}
summary{cursor:pointer;color:var(--muted);font-size:13.5px;padding:4px 0}
footer{color:var(--muted);font-size:12.5px;margin-top:28px}
@media(max-width:900px){.cards{grid-template-columns:minmax(0,1fr)}main{padding:24px 14px}}
@media print{.pane{display:block}.pick+label{display:none}figure{break-inside:avoid}}
"""
