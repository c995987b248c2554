"""Control flow: basic blocks, natural loops, and the path that a loop takes mostly."""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.sass.disassembly import Instruction


@dataclass
class Block:
    code: list[Instruction]
    successors: list[int] = field(default_factory=list)
    mmas: int = 0


def build_blocks(code: list[Instruction]) -> list[Block]:
    """Basic blocks in address order; block 0 is the entry."""
    ends = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL", "BSYNC")
    leaders = {code[0].address}
    for index, instruction in enumerate(code):
        if instruction.target is not None:
            leaders.add(instruction.target)
        if instruction.root in ends and index + 1 < len(code):
            leaders.add(code[index + 1].address)

    blocks: list[Block] = []
    for instruction in code:
        if instruction.address in leaders:
            blocks.append(Block([]))
        blocks[-1].code.append(instruction)
        blocks[-1].mmas += instruction.is_mma
    start = {block.code[0].address: index for index, block in enumerate(blocks)}

    joins: dict[str, int | None] = {}  # convergence register -> where its BSYNC goes on
    for index, block in enumerate(blocks):
        for instruction in block.code:
            if instruction.root == "BSSY":
                joins[instruction.operands.split(",")[0]] = instruction.target
        last = block.code[-1]
        falls_through, target = True, None
        if last.root in ("BRA", "JMP"):
            target = last.target
            # Besides a predicate, a uniform predicate operand or .ANY/.DIV/.CONV make a branch conditional.
            falls_through = (
                bool(last.predicate) or "," in last.operands or len(last.opcode.split(".")) > 1
            )
        elif last.root == "BSYNC":
            target = joins.get(last.operands)
            falls_through = target is None
        elif last.root in ends:
            falls_through = bool(last.predicate)
        if target in start:
            block.successors.append(start[target])
        if falls_through and index + 1 < len(blocks):
            block.successors.append(index + 1)
    return blocks


def post_order(blocks: list[Block]) -> list[int]:
    """Reachable blocks in depth-first post-order from the entry."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        node, successors = stack[-1]
        for successor in successors:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(blocks[successor].successors)))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def natural_loops(
    blocks: list[Block],
) -> tuple[dict[int, set[int]], dict[int, set[int]], list[int]]:
    """(header -> body, header -> latches, reverse post-order) of the natural loops."""
    order = post_order(blocks)[::-1]
    predecessors: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for successor in blocks[node].successors:
            predecessors[successor].append(node)

    dominators = dict.fromkeys(order, (1 << len(blocks)) - 1)  # bit sets
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            common = -1
            for predecessor in predecessors[node]:
                common &= dominators[predecessor]
            common |= 1 << node
            if common != dominators[node]:
                dominators[node] = common
                changed = True

    bodies: dict[int, set[int]] = {}
    latches: dict[int, set[int]] = {}
    for node in order:
        for header in blocks[node].successors:
            if dominators[node] >> header & 1:
                latches.setdefault(header, set()).add(node)
                body = bodies.setdefault(header, {header})
                todo = [node]
                while todo:
                    inner = todo.pop()
                    if inner not in body:
                        body.add(inner)
                        todo += predecessors[inner]
    return bodies, latches, order


def hot_path(
    blocks: list[Block], header: int, body: set[int], latches: set[int], order: list[int]
) -> list[int]:
    """Blocks of the path from header to latch with the most MMA and then the fewest instructions."""
    position = {node: index for index, node in enumerate(order)}
    best: dict[int, tuple[int, int]] = {header: (blocks[header].mmas, -len(blocks[header].code))}
    came_from: dict[int, int] = {}
    for node in (node for node in order if node in body):
        if node not in best:
            continue
        for successor in blocks[node].successors:
            if successor not in body or position[successor] <= position[node]:
                continue
            score = (
                best[node][0] + blocks[successor].mmas,
                best[node][1] - len(blocks[successor].code),
            )
            if successor not in best or score > best[successor]:
                best[successor] = score
                came_from[successor] = node
    path = [max(latches, key=lambda node: best.get(node, (-1, 0)))]
    while path[-1] != header:
        path.append(came_from[path[-1]])
    return path[::-1]
