#!/usr/bin/env bash
# Draws docs/previews/*.png: the dashboards over a recorded run, with Grafana's own components from npm in Chromium.
# Needs node, npm (430 MB of packages), chromium and prometheus, in an environment with the development tools:
#   bash tools/previews/render.sh [FOLDER to work in]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${1:-$(mktemp -d)}
out=$here/../../docs/previews
mkdir -p "$work" "$out"
cp "$here/app.jsx" "$work"
python "$here/data.py" "$work"
cd "$work"
if [ ! -d node_modules/@grafana/ui ]; then
    npm init -y >/dev/null
    npm install --no-audit --no-fund --legacy-peer-deps @grafana/{data,ui,schema,i18n,runtime}@13.2.2 \
        react@19 react-dom@19 rxjs esbuild
fi
npx esbuild app.jsx --bundle --outfile=app.js --jsx=automatic --log-level=error \
    --define:process.env.NODE_ENV='"production"' --define:global=window \
    --loader:.ttf=dataurl --loader:.woff=dataurl --loader:.woff2=dataurl --loader:.svg=dataurl
for uid in overview accuracy parallelism fleet; do
    rows=$(node -p "Math.max(...require('$here/../../dashboards/grafana/energylens-$uid.json').panels.map(
        ({ gridPos }) => gridPos.y + gridPos.h))")
    cat >page.html <<PAGE
<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="app.css">
<body style="margin:0"><div id="root"></div><script>window.UID = "energylens-$uid"</script><script src="app.js"></script>
PAGE
    chromium --headless=new --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars \
        --window-size="1500,$((rows * 34 + 40))" --virtual-time-budget=8000 --screenshot="$out/$uid.png" \
        "file://$work/page.html"
done
