"""The look of the report's page: light and dark, narrow and wide screens, paper. States have a sign and a word besides their colour."""

from typing import Final

_LIGHT: Final = (
    "--ink:#1c2430;--soft:#566273;--page:#fbfbfa;--card:#fff;--line:#dde1e6;"
    "--bar:#3b6fb6;--good:#1d7a46;--bad:#b3261e;--warn:#8a5a00"
)
_DARK: Final = (
    "--ink:#e6e9ee;--soft:#a3adba;--page:#14181e;--card:#1c222a;--line:#323a45;"
    "--bar:#7aa7e6;--good:#6fcf97;--bad:#ff8a80;--warn:#f0c36d"
)
_SCREEN: Final = """*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:64rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem;border-bottom:1px solid var(--line);padding-bottom:.3rem}
p{max-width:45rem}.soft{color:var(--soft)}.file{font-size:.875rem}code{font-size:.88em;overflow-wrap:anywhere}
.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.verdict{display:flex;flex-wrap:wrap;gap:.5rem 2rem;align-items:center;background:var(--card);border:1px solid var(--line);
border-left:.5rem solid currentColor;border-radius:.5rem;padding:1rem 1.25rem}.verdict p{margin:.15rem 0;color:var(--ink)}
.score{font-size:3rem;font-weight:650;line-height:1.1;white-space:nowrap}.score small{font-size:1rem;font-weight:400}
.verdict div{flex:1 1 17rem}.verdict strong{font-size:1.2rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem}
.card b{display:block;font-size:1.35rem}
.wide{overflow-x:auto}.wide:focus-visible{outline:2px solid var(--bar);outline-offset:2px}
table{border-collapse:collapse;width:100%;margin:.75rem 0;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding-bottom:.3rem}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:break-word}
th{vertical-align:bottom}td{max-width:28rem}td.n{text-align:right;white-space:nowrap}th.n{text-align:right}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,25rem),1fr));gap:1rem;margin:1rem 0;align-items:start}
figure{margin:0;max-width:34rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem}
figcaption{font-weight:600;margin-bottom:.5rem}svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink);font:13px system-ui,sans-serif}svg .tick{fill:var(--soft);font-size:12px}.bar{fill:var(--bar)}
svg .value{paint-order:stroke;stroke:var(--card);stroke-width:3px}
.axis{stroke:var(--line)}.mark{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:4 3}
.range{stroke:var(--bar);stroke-width:3}.dot{fill:var(--bar)}
.advice{padding-left:1.4rem}.advice li{margin-bottom:1rem}.advice p{margin:.1rem 0}.advice code{display:block;margin-top:.25rem;
background:var(--card);border:1px solid var(--line);border-radius:.35rem;padding:.4rem .6rem}
@media(max-width:32rem){main{padding:1.25rem .75rem 3rem}figure{padding:.6rem .5rem}th,td{padding:.3rem .4rem}}
"""
_PAPER: Final = """body{background:#fff;font-size:10.5pt}main{max-width:none;padding:0}
.wide{overflow:visible}figure,.card,.verdict,tr,li{break-inside:avoid}h2,caption,figcaption{break-after:avoid}
thead{display:table-header-group}.plots{grid-template-columns:1fr 1fr}.bar,.dot{print-color-adjust:exact}"""
STYLE: Final = (
    f":root{{color-scheme:light dark;{_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
    f"{_SCREEN}@media print{{:root{{{_LIGHT}}}{_PAPER}}}"
)
