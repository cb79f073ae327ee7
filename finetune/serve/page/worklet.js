// The two ends of a call in the audio thread: what is said goes out in frames, what comes is played.

class Capture extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.frame = new Float32Array(options.processorOptions.frameSamples);
    this.filled = 0;
  }

  process(inputs) {
    // A source that has ended gives no channels: the user is silent.
    const input = inputs[0][0] ?? new Float32Array(128);
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
