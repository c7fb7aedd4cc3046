// Search in pages that are opened as files. Browsers start no workers from files, so one runs in a hidden frame here.
// The name tells the plugin `offline` that pages need no script of that kind from elsewhere.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const script = new URL(address, location.href);
      const answer = "postMessage = (data) => parent.postMessage(data, '*')";
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = `<script>${answer}</script><script src="${script}"></script>`;
      this.frame.addEventListener("load", () => {
        const waiting = this.waiting;
        this.waiting = null;
        waiting.forEach((data) => this.postMessage(data));
      });
      addEventListener("message", (event) => {
        if (event.source === this.frame.contentWindow) {
          this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        }
      });
      document.body.append(this.frame);
    }

    postMessage(data) {
      if (this.waiting) {
        this.waiting.push(data);
      } else {
        // Not by its postMessage, which answers us: a frame made by a page has that page's origin.
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
      }
    }
  };
}
