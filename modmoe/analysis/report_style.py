"""How a report looks: its style sheet, and the shades of its heat maps."""

import math

import numpy as np

STEPS = 21  # shades of the heat maps; the eye cannot tell more apart


def shades() -> str:
    """Rules for the shades s0..: one hue, lightness in even steps, text in the colour of higher contrast."""
    light = [_oklch(0.97 - 0.57 * t, 0.012 + 0.108 * t, 255) for t in np.linspace(0, 1, STEPS)]
    dark = [_oklch(0.27 + 0.58 * t, 0.025 + 0.045 * t + 0.16 * t * (1 - t), 255) for t in np.linspace(0, 1, STEPS)]
    return _rules(light) + "@media (prefers-color-scheme: dark) {" + _rules(dark) + "}"


def _rules(colours: list[tuple[float, float, float]]) -> str:
    rules, names = [], []
    for step, rgb in enumerate(colours):
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        # WCAG contrast against white is 1.05 / (Y + 0.05) and against black (Y + 0.05) / 0.05.
        text = "#fff" if (luminance + 0.05) ** 2 < 1.05 * 0.05 else "#000"
        names.append("#" + "".join(f"{round(255 * x):02x}" for x in rgb))
        rules.append(f".s{step} {{ background: {names[-1]}; color: {text} }}")
    return f"{' '.join(rules)} .bar {{ background: linear-gradient(to right, {', '.join(names[::4])}) }}"


def _oklch(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """Convert a colour of the OKLCH space (equal steps look equal; Ottosson 2020) to sRGB in [0, 1]."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    clipped = (min(max(x, 0.0), 1.0) for x in linear)
    red, green, blue = (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in clipped)
    return red, green, blue


CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16202c; --muted: #5b6878;
  --line: #dfe4ea; --none: #eef0f3 }
@media (prefers-color-scheme: dark) { :root { --page: #0f141a; --card: #171e26; --ink: #e6ebf1;
  --muted: #94a1b1; --line: #2a343f; --none: #1d252e } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 0 }
h2::first-letter { text-transform: uppercase }
.lead { color: var(--muted); max-width: 76ch; margin: 0 }
section { margin-top: 36px }
.head { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: center; justify-content: space-between;
  margin-bottom: 12px }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.scroll { overflow-x: auto }
code, pre, .config { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.results { width: 100%; font-size: 14px }
.results th, .results td { padding: 9px 11px; text-align: right; border-top: 1px solid var(--line) }
.results td { white-space: nowrap }
.results thead th { border-top: 0; color: var(--muted); font-size: 13px; font-weight: 500;
  vertical-align: bottom; line-height: 1.3 }
.results th:first-child { text-align: left; position: sticky; left: 0; background: var(--card) }
.results tbody th { font-weight: 600; min-width: 8ch }
.half { color: var(--muted) }
.about { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 16px 0 0; font-size: 14px }
.about dt { font-weight: 600 } .about dd { margin: 0; color: var(--muted) }
@media (max-width: 600px) { .about { grid-template-columns: 1fr } .about dd { margin-bottom: 8px } }
.note { margin: 8px 0 0; font-size: 13px; color: var(--muted) }
.maps { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start }
figure { margin: 0; padding: 14px 16px 16px; max-width: 100% }
figure img { display: block; max-width: 100%; height: auto }
figcaption { font-weight: 600; margin-bottom: 6px }
.heat { border-collapse: separate; border-spacing: 2px }
.heat th { font-size: 12px; font-weight: 500; color: var(--muted); padding: 2px 6px; white-space: nowrap }
.heat tbody th { text-align: right }
.heat .axis { text-align: center; font-style: italic; font-weight: 400 }
.heat .side { padding: 0 2px }
.heat .side span { writing-mode: vertical-rl; transform: rotate(180deg) }
.heat tbody td { min-width: 46px; height: 34px; padding: 0 5px; text-align: center; font-size: 13px;
  border-radius: 4px }
.heat .none { background: repeating-linear-gradient(-45deg, var(--none) 0 4px, transparent 4px 8px) }
.legend { display: flex; align-items: center; gap: 8px; margin: 0; font-size: 12px; color: var(--muted) }
.bar { width: 140px; height: 10px; border-radius: 5px; border: 1px solid var(--line) }
summary { cursor: pointer; padding: 12px 16px; font-weight: 600; font-size: 18px }
.config { width: 100% }
.config th, .config td { text-align: left; vertical-align: top; padding: 6px 16px; overflow-wrap: anywhere;
  border-top: 1px solid var(--line) }
.config th { font-weight: 500; color: var(--muted); width: 34% }
pre { margin: 10px 0 0; padding: 12px 16px; overflow-x: auto }
@media (max-width: 600px) { main { padding: 24px 14px 48px } h1 { font-size: 23px }
  .results th, .results td { padding: 9px 11px } figure { padding: 12px; width: 100% }
  .heat tbody td { min-width: 40px; padding: 0 3px } }
@media print { body { background: none } td, .bar { print-color-adjust: exact } }
"""
