"""The style sheet of the report, inlined into the page, and the colours that the plots share with it."""

# Okabe-Ito: distinguishable with every common colour-vision deficiency.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#4D4D4D")
CONTROL = "#5C6670"

CSS = """
:root { color-scheme: light dark; --bg:#f6f7f9; --card:#fff; --ink:#1b2430; --soft:#5a6675; --line:#dfe4ea;
  --accent:#0072B2; --warn-bg:#fff3d6; --warn-ink:#6b4a00; --warn-line:#e8b23a; --good:#006a4e; --bad:#a63c00; }
@media (prefers-color-scheme: dark) { :root { --bg:#12161c; --card:#1b2129; --ink:#e6ebf1; --soft:#9aa7b5;
  --line:#303a46; --accent:#6cb8ea; --warn-bg:#3a2e10; --warn-ink:#ffd98a; --warn-line:#a67c1e; --good:#5fd0a8;
  --bad:#ff9d66; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--bg); color:var(--ink); line-height:1.5; font-size:15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width:1100px; margin:0 auto; padding:32px 20px 64px; }
header h1 { font-size:28px; line-height:1.2; margin:0 0 4px; letter-spacing:-0.01em; }
header p { margin:0; color:var(--soft); }
h2 { font-size:20px; margin:0 0 4px; }
h3 { font-size:16px; margin:24px 0 4px; }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:22px 24px;
  margin-top:20px; }
p { margin:6px 0 10px; max-width:78ch; }
.soft, figcaption, caption, .note { color:var(--soft); font-size:13.5px; }
.banner { background:var(--warn-bg); color:var(--warn-ink); border:1px solid var(--warn-line); border-radius:8px;
  padding:10px 14px; margin-top:14px; }
.badge { display:inline-block; background:var(--warn-bg); color:var(--warn-ink); border:1px solid var(--warn-line);
  border-radius:10px; padding:0 8px; font-size:12px; font-weight:600; margin-right:6px; }
nav { margin-top:14px; display:flex; flex-wrap:wrap; gap:6px 16px; font-size:14px; }
a { color:var(--accent); text-decoration:none; } a:hover { text-decoration:underline; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(230px, 1fr)); gap:14px; margin-top:20px; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 18px; }
.tile .value { font-size:28px; font-weight:650; font-variant-numeric:tabular-nums; line-height:1.25; }
.tile .what { font-weight:600; } .tile .soft { display:block; }
.scroll { overflow-x:auto; }
.columns { display:grid; grid-template-columns:repeat(auto-fit, minmax(400px, 1fr)); gap:0 40px; }
.columns table { width:100%; }
.columns tbody th { white-space:nowrap; }
table { border-collapse:collapse; margin:10px 0 4px; font-size:14px; min-width:50%; }
caption { caption-side:top; text-align:left; padding-bottom:6px; }
th, td { padding:5px 16px 5px 0; border-bottom:1px solid var(--line); text-align:left; vertical-align:top; }
thead th { border-bottom:2px solid var(--line); font-weight:600; vertical-align:bottom; }
tbody th { font-weight:500; }
td.num, th.num { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap; }
td .ci { display:block; color:var(--soft); font-size:12.5px; }
td.mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size:12.5px; overflow-wrap:anywhere; }
tr.group th { padding-top:14px; font-weight:650; color:var(--accent); }
.gain { color:var(--good); font-weight:600; } .loss { color:var(--bad); font-weight:600; }
.verdict { border-left:4px solid var(--accent); padding:6px 14px; margin:12px 0; max-width:82ch; }
figure { margin:14px 0 4px; }
figure img { max-width:100%; height:auto; background:#fff; border-radius:6px; display:block; }
figcaption { margin-top:6px; max-width:90ch; }
details summary { cursor:pointer; font-weight:600; margin-top:12px; }
footer { color:var(--soft); font-size:13px; margin-top:24px; }
@media print { body { background:#fff; } section, .tile { break-inside:avoid; } }
"""
