const dark = matchMedia('(prefers-color-scheme: dark)');
function colours() {
  const style = getComputedStyle(document.documentElement), read = name => style.getPropertyValue(name).trim();
  return { ink: read('--ink'), line: read('--line'), soft: read('--soft'), card: read('--card') };
}
function themed(figure) {
  const c = colours(), layout = structuredClone(figure.layout);
  layout.font = { ...layout.font, color: c.ink };
  layout.hoverlabel = { ...layout.hoverlabel, bgcolor: c.card, bordercolor: c.line, font: { color: c.ink } };
  for (const axis of ['xaxis', 'yaxis'])
    layout[axis] = { ...layout[axis], gridcolor: c.line, linecolor: c.line, zerolinecolor: c.line, tickfont: { color: c.soft },
      automargin: true };
  for (const shape of layout.shapes || []) shape.line = { ...shape.line, color: c.line };
  for (const note of layout.annotations || []) {
    note.bgcolor = getComputedStyle(document.body).backgroundColor; note.opacity = 0.85; note.font = { ...note.font, color: c.soft };
  }
  return layout;
}
const figures = JSON.parse(document.getElementById('figures').textContent);
function draw() {
  for (const [id, figure] of Object.entries(figures))
    Plotly.react(id, structuredClone(figure.data), themed(figure), { responsive: true, displayModeBar: false });
}
draw();
dark.addEventListener('change', draw);
