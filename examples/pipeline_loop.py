"""Local learning in several processes: `ModulePipeline`, no mmengine.

The network of plain_loop.py with a module in each process, which trains on the next
batch while the later ones are at the batches before. The weights are those of
plain_loop.py, bit by bit:

    torchrun --standalone --nproc-per-node 3 examples/pipeline_loop.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_loop import build, load_digits_as_tensors

from man_mm.parallel import ModulePipeline


def main(epochs=3, batch=64):
    dist.init_process_group('gloo')
    torch.manual_seed(0)  # all ranks have the same weights and the same batches
    images, labels, train, test = load_digits_as_tensors()
    learner = build()
    model = learner.model
    pipeline = ModulePipeline(learner)
    optimizer = torch.optim.AdamW(pipeline.params(), lr=2e-3)

    def backward(loss, module, complete):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(epochs):
        for index in train[torch.randperm(len(train))].split(batch):
            x, y = images[index], labels[index]
            pipeline.step(lambda x=x, y=y: F.cross_entropy(model(x), y), y, backward)
    state = pipeline.gather()  # on rank 0: the plain model, its heads, the bank
    if dist.get_rank() == 0:
        plain = build().model.eval()
        plain.load_state_dict(state['model'])
        with torch.no_grad():
            hits = plain(images[test]).argmax(1) == labels[test]
        print(f'accuracy {hits.float().mean().item():.3f}')
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
