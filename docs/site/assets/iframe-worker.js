// Browsers start no worker for pages that are opened as files. The search then runs its
// script in a hidden frame of the page, and talks to it as to a worker.
'use strict';
if (location.protocol === 'file:') {
  window.IFrameWorker = class extends EventTarget {
    constructor(address) {
      super();
      this.frame = document.createElement('iframe');
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => {
        this.dispatchEvent(new MessageEvent('message', { data }));
      };
      this.ready = new Promise((resolve) => {
        const script = inside.document.createElement('script');
        script.src = new URL(address, location.href);
        script.addEventListener('load', resolve);
        inside.document.body.append(script);
      });
    }

    postMessage(data) {
      this.ready.then(() => {
        const inside = this.frame.contentWindow;
        inside.dispatchEvent(new inside.MessageEvent('message', { data }));
      });
    }

    terminate() { this.frame.remove(); }
  };
  window.Worker = window.IFrameWorker;
}
