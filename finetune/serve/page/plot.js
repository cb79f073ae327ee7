// A line for each TTT layer over the time of the call.

export class Plot {
  constructor(canvas, legend) {
    this.canvas = canvas;
    this.legend = legend;
    this.begin([]);
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  begin(layers) {
    this.layers = layers;
    this.points = [];
    this.legend.replaceChildren();
    this.values = layers.map((layer, index) => {
      const item = document.createElement("span");
      const mark = document.createElement("i");
      mark.style.background = `var(--c${index % 6})`;
      const value = document.createElement("output");
      value.textContent = "0";
      item.append(mark, `layer ${layer}: `, value);
      this.legend.append(item);
      return value;
    });
    this.draw();
  }

  add(atSec, changes) {
    this.points.push({ atSec, values: this.layers.map((layer) => changes[layer]) });
    this.values.forEach((value, index) => {
      value.textContent = changes[this.layers[index]].toPrecision(3);
    });
    // An hour has 9000 points; a screen shows fewer.
    if (this.points.length > 4000) this.points = this.points.filter((_, i) => i % 2 === 0);
    this.draw();
  }

  draw() {
    const { canvas } = this;
    const scale = devicePixelRatio;
    const width = (canvas.width = Math.round(canvas.clientWidth * scale));
    const height = (canvas.height = Math.round(canvas.clientHeight * scale));
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const context = canvas.getContext("2d");
    const [left, right, top, bottom] = [56 * scale, 8 * scale, 8 * scale, 22 * scale];
    const lastSec = Math.max(10, this.points.at(-1)?.atSec ?? 0);
    const highest = Math.max(1e-6, ...this.points.flatMap((point) => point.values)) * 1.1;
    const x = (sec) => left + (sec / lastSec) * (width - left - right);
    const y = (value) => height - bottom - (value / highest) * (height - top - bottom);
    context.font = `${12 * scale}px system-ui, sans-serif`;
    context.fillStyle = color("--soft");
    context.strokeStyle = color("--line");
    context.lineWidth = scale;
    for (const share of [0, 0.5, 1]) {
      const value = (highest / 1.1) * share;
      context.beginPath();
      context.moveTo(left, y(value));
      context.lineTo(width - right, y(value));
      context.stroke();
      context.textAlign = "right";
      context.fillText(share ? value.toPrecision(2) : "0", left - 6 * scale, y(value) + 4 * scale);
    }
    context.textAlign = "left";
    context.fillText("0 s", left, height - 6 * scale);
    context.textAlign = "right";
    context.fillText(`${Math.round(lastSec)} s`, width - right, height - 6 * scale);
    this.layers.forEach((_, index) => {
      context.strokeStyle = color(`--c${index % 6}`);
      context.lineWidth = 2 * scale;
      context.beginPath();
      this.points.forEach(({ atSec, values }) => context.lineTo(x(atSec), y(values[index])));
      context.stroke();
    });
  }
}
