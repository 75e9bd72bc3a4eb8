// Draws one dashboard's panels with Grafana's published components. It is a preview, not Grafana: the frame, tables and
// headings are plain HTML, and heatmaps are left out, because those panels are not published.
import 'uplot/dist/uPlot.min.css';
import { Component } from 'react';
import { createRoot } from 'react-dom/client';
import { FieldType, ThemeContext, createTheme, dateTime, getDisplayProcessor, getValueFormat, toDataFrame } from '@grafana/data';
import { BarGauge, BigValue, LegendDisplayMode, TimeSeries } from '@grafana/ui';
import data from './data.js';

const theme = createTheme({ colors: { mode: 'light' } });
const board = data.boards.find((board) => board.uid === window.UID);
const COLORS = ['#3274D9', '#FF780A', '#56A64B', '#A352CC', '#E02F44', '#F2CC0C', '#0F8B8D', '#B877D9', '#7A7A7A'];
const COLUMN = 1500 / 24;
const ROW = 34;
const nowMs = data.now * 1000;
const from = dateTime(nowMs - data.seconds * 1000);
const timeRange = { from, to: dateTime(nowMs), raw: { from, to: dateTime(nowMs) } };

const legend = (target, labels) =>
  target.legendFormat === '__auto'
    ? Object.values(labels).join(' ') || 'value'
    : target.legendFormat.replace(/{{(\w+)}}/g, (_, label) => labels[label] ?? '');

// The answers to a panel's queries as frames, with the panel's defaults and overrides.
function frames(panel) {
  const found = [];
  panel.targets.forEach((target, i) => {
    const override = panel.fieldConfig.overrides.find(({ matcher }) => matcher.options === target.refId);
    for (const series of panel.results[i]) {
      const config = structuredClone(panel.fieldConfig.defaults);
      config.custom ??= {};
      config.color = { mode: 'fixed', fixedColor: COLORS[found.length % COLORS.length] };
      config.displayName = legend(target, series.metric);
      for (const { id, value } of override?.properties ?? []) {
        if (id === 'unit') config.unit = value;
        if (id === 'custom.axisPlacement') config.custom.axisPlacement = value;
      }
      const points = series.values ?? [series.value];
      const values = points.map(([, value]) => (Number.isFinite(Number(value)) ? Number(value) : null));
      const frame = toDataFrame({
        refId: target.refId,
        fields: [
          { name: 'Time', type: FieldType.time, values: points.map(([seconds]) => seconds * 1000) },
          { name: 'Value', type: FieldType.number, values, config, labels: series.metric },
        ],
      });
      for (const field of frame.fields) {
        field.display = getDisplayProcessor({ field, theme, timeZone: 'utc' });
        field.state = { displayName: field.config.displayName ?? field.name, seriesIndex: found.length };
      }
      found.push(frame);
    }
  });
  return found;
}

function Stat({ panel, width, height }) {
  const [frame] = frames(panel);
  if (!frame) return <Empty panel={panel} />;
  const field = frame.fields[1];
  const value = { ...field.display(field.values.findLast((v) => v !== null)), color: COLORS[0], title: '' };
  return <BigValue theme={theme} width={width} height={height} value={value} colorMode="value" graphMode="none" />;
}

function Bars({ panel, width }) {
  const fields = frames(panel).map((frame) => frame.fields[1]);
  const max = Math.max(...fields.map((field) => field.values[0]));
  return fields.map((field) => (
    <div key={field.config.displayName} style={{ padding: '4px 8px', fontSize: 13 }}>
      {field.config.displayName}
      <BarGauge theme={theme} width={width - 16} height={46} field={{ ...field.config, min: 0, max }} orientation="horizontal"
        value={{ ...field.display(field.values[0]), color: COLORS[0] }} displayMode="basic" display={field.display} />
    </div>
  ));
}

function Lines({ panel, width, height }) {
  const found = frames(panel);
  if (!found.length) return <Empty panel={panel} />;
  const shown = { showLegend: true, displayMode: LegendDisplayMode.List, placement: 'bottom', calcs: [] };
  return <TimeSeries frames={found} structureRev={1} timeRange={timeRange} timeZone="utc" width={width} height={height}
    theme={theme} legend={shown} options={{}} />;
}

function Table({ panel }) {
  const rows = new Map();
  panel.results.forEach((series, i) => series.forEach(({ metric, value }) => {
    const key = JSON.stringify(metric);
    rows.set(key, { ...rows.get(key), ...metric, [i]: Number(value[1]) });
  }));
  const columns = [...new Set(panel.results.flat().flatMap(({ metric }) => Object.keys(metric)))].map((label) => [label, label]);
  panel.targets.forEach(({ legendFormat }, i) => legendFormat !== '__auto' && columns.push([i, legendFormat]));
  const format = getValueFormat('short');
  const text = (cell) => (typeof cell === 'number' ? [format(cell, 3)].map(({ text, suffix }) => text + (suffix ?? ''))[0] : cell);
  const cell = { padding: '6px 8px', borderBottom: '1px solid #eee', textAlign: 'left' };
  return (
    <table style={{ borderCollapse: 'collapse', width: '100%', fontSize: 13 }}>
      <thead><tr>{columns.map(([key, name]) => <th key={key} style={cell}>{name}</th>)}</tr></thead>
      <tbody>{[...rows].map(([key, row]) => <tr key={key}>{columns.map(([c]) => <td key={c} style={cell}>{text(row[c])}</td>)}</tr>)}</tbody>
    </table>
  );
}

const Empty = ({ panel }) => <div style={{ padding: 20, color: '#888' }}>{panel.fieldConfig.defaults.noValue}</div>;
const Heatmap = () => <div style={{ padding: 20, color: '#888' }}>(a heatmap, which this preview cannot draw)</div>;
const KINDS = { stat: Stat, bargauge: Bars, timeseries: Lines, table: Table, heatmap: Heatmap };

class Guard extends Component {
  state = {};
  static getDerivedStateFromError(error) { return { error }; }
  render() { return this.state.error ? <pre style={{ color: 'red' }}>{this.state.error.stack}</pre> : this.props.children; }
}

function Framed({ panel }) {
  const { x, y, w, h } = panel.gridPos;
  const place = { position: 'absolute', left: x * COLUMN, top: y * ROW, width: w * COLUMN - 8, height: h * ROW - 8 };
  if (panel.type === 'row') return <div style={{ ...place, fontWeight: 'bold', padding: 4 }}>{panel.title}</div>;
  const Body = KINDS[panel.type];
  return (
    <div style={{ ...place, background: '#fff', border: '1px solid #ddd', overflow: 'hidden' }}>
      <div style={{ padding: '4px 8px', fontSize: 13, fontWeight: 500, height: 26 }}>{panel.title}</div>
      <Guard><Body panel={panel} width={w * COLUMN - 12} height={h * ROW - 40} /></Guard>
    </div>
  );
}

createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <div style={{ fontFamily: 'sans-serif', background: '#f4f5f5' }}>
      <div style={{ padding: 8, fontSize: 18 }}>
        {board.title} <small style={{ color: '#888' }}>(a preview over recorded runs, drawn with Grafana's components; not a screenshot of Grafana)</small>
      </div>
      <div style={{ position: 'relative' }}>{board.panels.map((panel) => <Framed key={panel.id} panel={panel} />)}</div>
    </div>
  </ThemeContext.Provider>
);
