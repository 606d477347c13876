"""The style sheet of the report's page, light and dark, wide and narrow."""

from olavlm.pipelines.layer_plot import DASHES

_DASHES = "".join(f".line.s{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(DASHES) if dash)
_DARK = """--paper:#15171b;--raised:#1d2026;--ink:#e4e6ea;--soft:#9ba2ad;--rule:#343943;
--fault:#ff8f73;--fault-back:#3a211c;--c0:#5fb0f5;--c1:#f2a154;--c2:#46c9a2;--c3:#dd93cf;--c4:#e6cf57;--c5:#a9b4c6"""
STYLE = (
    """
:root{color-scheme:light dark;--paper:#fff;--raised:#f5f6f8;--ink:#1d2126;--soft:#626b77;--rule:#dde1e6;
--fault:#a5320f;--fault-back:#fdeee9;--c0:#0b6cb5;--c1:#cf5a00;--c2:#00795c;--c3:#ab4a93;--c4:#8a7000;--c5:#566173}
@media (prefers-color-scheme:dark){:root{DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1240px;margin:0 auto;padding:36px clamp(14px,3vw,36px) 80px}
h1{font-size:28px;line-height:1.2;letter-spacing:-.015em;margin:0 0 4px;font-weight:650}
h2{font-size:22px;letter-spacing:-.01em;margin:0 0 2px;font-weight:650;overflow-wrap:anywhere}
h3{font-size:16px;margin:0 0 8px;font-weight:650}
h4{font-size:13.5px;margin:0 0 6px;font-weight:600}
section{margin-top:44px;padding-top:26px;border-top:1px solid var(--rule)}
.block{margin-top:34px}
.lead,.about,.beyond,figcaption small,footer{color:var(--soft)}
.lead{margin:0 0 14px;overflow-wrap:anywhere}.about{margin:-4px 0 12px;max-width:76ch;font-size:14px}
a{color:var(--c0)}:focus-visible{outline:2px solid var(--c0);outline-offset:3px;border-radius:3px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:10px;margin:16px 0}
.tiles>div{background:var(--raised);border-radius:8px;padding:11px 14px}
.tiles span,.tiles small{display:block;color:var(--soft);font-size:12.5px;line-height:1.35}
.tiles strong{display:block;font-size:22px;font-weight:600;line-height:1.35;font-variant-numeric:tabular-nums}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:0 32px;margin:14px 0 0}
.facts>div{display:flex;gap:12px;padding:5px 0;border-bottom:1px solid var(--rule);font-size:14px}
dt{flex:0 0 124px;color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;min-width:0}
.fault,.note{margin:8px 0;padding:8px 13px;border-left:3px solid var(--fault);background:var(--fault-back);
border-radius:0 6px 6px 0;font-size:14px;overflow-wrap:anywhere}
.fault{list-style:none}.fault li{padding:2px 0 2px 24px;text-indent:-24px}
.fault li::before{content:"\\26A0\\FE0E";display:inline-block;width:24px;text-indent:0;color:var(--fault)}
.note{border-color:var(--rule);background:var(--raised)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:26px 28px}
.charts+.charts,.charts+.scroll,details+.charts,.fault+.charts{margin-top:26px}
details h4{margin-top:18px}
figure{margin:0;min-width:0}figcaption{font-size:13.5px;font-weight:600}
.chart>svg{display:block;width:100%;height:auto;overflow:visible}
.chart text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
path.mark{stroke:var(--fault);stroke-width:2.2}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
path{fill:none;stroke:var(--s);stroke-linejoin:round}.raw{stroke-width:1;opacity:.3}
.band{stroke:none;fill:var(--s);opacity:.2}.line{stroke-width:1.9}
.dot{fill:var(--s)}
.legend{display:flex;flex-wrap:wrap;gap:0 16px;font-weight:400;color:var(--soft);font-size:12.5px;min-height:20px}
.legend b{color:var(--ink);font-weight:500;font-variant-numeric:tabular-nums}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;background:var(--s)}
.c0,.s0{--s:var(--c0)}.c1,.s1{--s:var(--c1)}.c2,.s2{--s:var(--c2)}.c3,.s3{--s:var(--c3)}.c4,.s4{--s:var(--c4)}
.c5,.s5{--s:var(--c5)}
DASHES
.chart path.bar{stroke:var(--s);opacity:.6}.dash{width:26px;height:6px;vertical-align:middle;margin-right:3px}
.multiples{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:12px 18px;margin-top:12px}
.multiples svg{display:block;width:100%;height:auto}
.multiples figcaption{font-weight:400;font-size:12px;color:var(--soft)}
.multiples b{color:var(--ink);font-weight:500;font-variant-numeric:tabular-nums}
.drawn{margin-top:12px}.drawn figcaption{font-weight:400;margin-top:4px}.sheet{background:#fff}
.beyond{font-size:12px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px}
caption{text-align:left;font-weight:600;font-size:13.5px;padding-bottom:4px}
th,td{text-align:left;padding:6px 22px 6px 0;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:500;color:var(--soft);font-size:13px}
.num{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:inline-block;height:8px;width:110px;background:var(--rule);border-radius:3px;overflow:hidden;
vertical-align:1px}
.bar i{display:block;height:100%;background:var(--c0)}
details{margin-top:10px}summary{cursor:pointer;font-weight:500}
pre{margin:10px 0 0;padding:14px 16px;background:var(--raised);border-radius:8px;overflow-x:auto;
font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
img{display:block;max-width:100%;height:auto;border-radius:4px}
img.pixels{image-rendering:pixelated;width:100%;height:auto;border-radius:3px}
img.bars{width:100%;border-radius:0}
.empty{display:flex;align-items:center;justify-content:center;text-align:center;aspect-ratio:1;padding:10px;border-radius:4px;
font-size:12px;line-height:1.35;color:var(--soft);border:1px dashed var(--rule);overflow-wrap:anywhere;
background:repeating-linear-gradient(45deg,transparent 0 9px,var(--raised) 9px 12px)}
.sample{display:grid;grid-template-columns:minmax(150px,210px) 1fr;gap:20px 28px;padding:20px 0;
border-top:1px solid var(--rule)}
.sample:first-of-type{border-top:0}
.sample>figure figcaption{font-weight:400;margin-top:6px;overflow-wrap:anywhere}
.sample>figure img{width:100%;max-height:260px;object-fit:contain;object-position:left top}
figcaption small{display:block;font-size:12.5px;line-height:1.4;font-weight:400}
.tasks{display:flex;flex-wrap:wrap;gap:20px 28px;align-items:flex-start}
.maps{display:grid;grid-template-columns:repeat(var(--n),minmax(64px,108px));gap:8px}
.maps figcaption,.strips figcaption{font-weight:400;font-size:12.5px;line-height:1.35;margin-top:4px}
.maps figcaption b,.strips figcaption b{font-weight:600;font-variant-numeric:tabular-nums}
.maps figcaption span{display:block}
.strips{display:grid;gap:8px;width:168px;max-width:100%}.strips .empty{aspect-ratio:auto;min-height:48px}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:24px 32px}
.answer{display:grid;grid-template-columns:minmax(96px,150px) 1fr;gap:16px;align-items:start}
.answer p{margin:0 0 8px;overflow-wrap:anywhere}.answer .asked{color:var(--soft)}
footer{margin-top:56px;padding-top:16px;border-top:1px solid var(--rule);font-size:13px}
@media (max-width:640px){.sheet{width:760px;max-width:none}
.sample{grid-template-columns:1fr}.sample>figure{max-width:260px}.block{margin-top:28px}
.maps{grid-template-columns:repeat(var(--m),minmax(0,1fr));width:100%}.task{width:100%}.strips{width:100%}h1{font-size:24px}}
@media print{section{break-inside:auto}figure,.sample,.answer{break-inside:avoid}}
""".replace("DARK", _DARK)
    .replace("DASHES", _DASHES)
    .strip()
)
