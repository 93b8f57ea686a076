"""How the page of a run looks: its colours, light and dark, and its layout, narrow and wide."""

COLOURS = ("a", "b", "c", "d", "e", "f")
"""Of curves; ``--a`` and so on in the style, besides ``--ink`` and ``--grid``."""
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --card: #f6f7f9; --ink: #1c2024; --dim: #626a73; --grid: #dde1e6;
  --a: #1769b5; --b: #c2410c; --c: #0f7b5f; --d: #9333a8; --e: #8a6d00; --f: #c0256b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1d2125; --ink: #e6e9ec; --dim: #9aa3ad; --grid: #363c43;
    --a: #6cb2f5; --b: #fb9a5c; --c: #4fd1a5; --d: #d59af0; --e: #e3c34a; --f: #f884b5;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 84rem; padding: 1.25rem clamp(.75rem, 3vw, 2.5rem) 3rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums;
}
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .1rem }
p { margin: 0; max-width: 60rem; color: var(--dim) }
p.note {
  margin: .75rem 0; padding: .5rem .8rem; max-width: none;
  border-left: .25rem solid var(--b); background: var(--card); color: inherit;
}
.cards {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9rem), 1fr)); gap: .75rem; margin: 1.25rem 0;
}
.cards div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem }
.cards b { display: block; font-size: 1.3rem; line-height: 1.3; font-weight: 600 }
.cards span, footer { color: var(--dim); font-size: .85rem }
.plots {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
  gap: 0 1.5rem; margin: .9rem 0;
}
figure {
  display: grid; grid-row: span 3; grid-template-rows: subgrid; row-gap: .2rem;
  margin: 0; min-width: 0; font-size: .85rem;
}
figure > :last-child { margin-bottom: 1.25rem }
figcaption b { font-weight: 600; font-size: .95rem }
figcaption span { display: inline-block; margin-right: .9rem; color: var(--dim) }
figcaption i {
  display: inline-block; width: .9rem; height: .2rem; margin-right: .35rem; vertical-align: middle; border-radius: 1px;
}
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font-family: inherit !important }
summary { cursor: pointer; color: var(--dim) }
.scroll { overflow-x: auto; overflow-wrap: normal }
table { border-collapse: collapse; margin: .5rem 0 }
h1 ~ .scroll { margin: 1.25rem 0 }
th, td { text-align: right; padding: .15rem .7rem .15rem 0; border-bottom: 1px solid var(--grid) }
th { font-weight: 600; vertical-align: bottom }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
footer { margin-top: 3rem }
"""
