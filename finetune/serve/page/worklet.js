// The two ends of a call in the audio thread: what is said goes out in frames, what comes is played.

const MOST_WAITING_SEC = 0.5; // a conversation that lags further behind is none

// Samples of one rate at another, by a windowed sinc below half of the lower one.
class Resampler {
  constructor(fromHz, toHz) {
    let [shared, rest] = [fromHz, toHz];
    while (rest) [shared, rest] = [rest, shared % rest];
    this.up = toHz / shared;
    this.down = fromHz / shared;
    const cutoff = 0.95 * Math.min(1, toHz / fromHz); // of half of fromHz
    this.half = Math.ceil(24 / cutoff);
    this.kernels = Array.from({ length: this.up }, (_, phase) => this.kernel(cutoff, phase / this.up));
    this.kept = new Float32Array(2 * this.half);
    this.phase = 0;
  }

  kernel(cutoff, fraction) {
    const weights = Float64Array.from({ length: 2 * this.half }, (_, tap) => {
      const x = tap - (this.half - 1) - fraction;
      const sinc = x === 0 ? 1 : Math.sin(Math.PI * cutoff * x) / (Math.PI * cutoff * x);
      return sinc * (0.5 + 0.5 * Math.cos((Math.PI * x) / (this.half + 1)));
    });
    const sum = weights.reduce((a, b) => a + b);
    return weights.map((weight) => weight / sum);
  }

  push(input) {
    if (this.up === this.down) return input;
    const samples = new Float32Array(this.kept.length + input.length);
    samples.set(this.kept);
    samples.set(input, this.kept.length);
    const output = [];
    let at = 0;
    while (at + 2 * this.half <= samples.length) {
      let sum = 0;
      this.kernels[this.phase].forEach((weight, tap) => (sum += weight * samples[at + tap]));
      output.push(sum);
      this.phase += this.down;
      at += Math.floor(this.phase / this.up);
      this.phase %= this.up;
    }
    this.kept = samples.slice(at);
    return Float32Array.from(output);
  }
}

class Capture extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.frame = new Float32Array(options.processorOptions.frameSamples);
    this.filled = 0;
    this.resampler = new Resampler(sampleRate, options.processorOptions.rateHz);
  }

  process(inputs) {
    // A source that has ended gives no channels: the user is silent.
    const input = this.resampler.push(inputs[0][0] ?? new Float32Array(128));
    for (let start = 0; start < input.length; ) {
      const length = Math.min(input.length - start, this.frame.length - this.filled);
      this.frame.set(input.subarray(start, start + length), this.filled);
      this.filled += length;
      start += length;
      if (this.filled === this.frame.length) {
        this.port.postMessage(this.frame.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

class Player extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.queue = [];
    this.waiting = 0;
    this.at = 0;
    // Begins, and begins again after a gap, with this much in hand.
    this.enough = options.processorOptions.startSamples;
    this.playing = false;
    this.port.onmessage = ({ data }) => {
      this.queue.push(data);
      this.waiting += data.length;
      while (this.queue.length > 1 && this.waiting > MOST_WAITING_SEC * sampleRate) {
        this.waiting -= this.queue.shift().length - this.at;
        this.at = 0;
      }
    };
  }

  process(_, outputs) {
    const output = outputs[0][0];
    this.playing = this.waiting > 0 && (this.playing || this.waiting >= this.enough);
    for (let i = 0; this.playing && i < output.length; i++) {
      output[i] = this.queue[0][this.at++];
      this.waiting--;
      if (this.at === this.queue[0].length) {
        this.queue.shift();
        this.at = 0;
        this.playing = this.queue.length > 0;
      }
    }
    return true;
  }
}

registerProcessor("capture", Capture);
registerProcessor("player", Player);
