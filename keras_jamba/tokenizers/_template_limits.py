"""A Jinja environment that bounds the time and memory of templates, on every platform and in any thread.

The operations that can create large values, or take long, first check that they fit the budget. Loops, calls, filters,
tests and operators check the time. Between two checks a template does a bounded amount of work.
"""

import functools
import operator
import string

from jinja2 import TemplateError, filters, nodes, pass_context, tests
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from keras_jamba.tokenizers import _template_calls as calls
from keras_jamba.tokenizers import _template_marks as marks
from keras_jamba.tokenizers._template_budget import (
    BITS,
    LimitError,
    budget,
    check_format,
    check_integers,
    check_printf,
    checked,
    growth,
    measured,
    repeated,
    shallow,
)

_OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": operator.pow,
    "%": operator.mod,
}
# Filters and globals that no chat template needs, and that take time or memory without a simple bound.
_MISSING_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_MISSING_GLOBALS = ("lipsum",)
# A literal of constants with at most this number of items is not counted.
_FEW = 16
# Nodes that copy the table of names, and the largest number of copied entries. Usual templates copy about 10,000.
_SCOPES = (nodes.If, nodes.CondExpr, nodes.For, nodes.Macro, nodes.CallBlock, nodes.With)
_MOST_COPIES = 10**6


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandboxed environment whose templates use no more than the current budget (`limited`)."""

    intercepted_binops = frozenset(_OPERATIONS)
    intercepted_unops = frozenset("+-")

    def __init__(self, **options):
        # The optimizer of Jinja takes cubic time for nested filters.
        super().__init__(finalize=_text, optimized=False, **options)
        self.filters = {
            name: calls.limited_filter(name, function)
            for name, function in filters.FILTERS.items()
            if name not in _MISSING_FILTERS
        } | {"_tick": _tick, "_checked": _checked, "_made": _made, "_sliced": _sliced, "_joined": _joined}
        self.tests = {name: calls.limited_test(function) for name, function in tests.TESTS.items()}
        for name in _MISSING_GLOBALS:
            del self.globals[name]

    def _parse(self, source, name, filename):
        tree = super()._parse(source, name, filename)
        _check_scopes(tree)
        return _Limiter().visit(tree)

    def concat(self, parts):
        """Joins the output of a template or macro, piece by piece."""
        kept, left = [], budget()
        for part in parts:
            left.spend(shallow(part))
            kept.append(part)
        return marks.joined(kept)

    def call_binop(self, context, operator, left, right):
        return binary(operator, left, right)

    def call_unop(self, context, operator, arg):
        budget().check()
        check_integers(arg)
        return super().call_unop(context, operator, arg)

    def getitem(self, obj, argument):
        return super().getitem(obj, argument if type(argument) in (str, int) else checked(argument))

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: B902, N805
        for each in (*args, *kwargs.values()):
            checked(each)
        calls.check_call(__obj, args, kwargs)
        if calls.joins(__obj):
            args = (list(args[0]), *args[1:]) if args else args
            calls.check_join(__obj.__self__, *args)
        result = super().call(__context, __obj, *args, **kwargs)
        calls.count_items(__obj, result)
        return calls.counted(result)

    def wrap_str_format(self, value):
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(value)
        def formatted(*args, **kwargs):
            form = value.__self__
            check_format(form, args, kwargs, string.Formatter().parse(form))
            return calls.counted(wrapped(*args, **kwargs))

        return formatted


def _check_scopes(tree):
    """Raises LimitError for a source that compiles slowly: Jinja copies the table of names in each branch."""
    names = {node.name for node in tree.find_all(nodes.Name)}
    if len(names) * sum(1 for _ in tree.find_all(_SCOPES)) > _MOST_COPIES:
        raise LimitError("a template with too many branches and variables")


def binary(symbol, left, right):
    """Returns the value of a binary operation."""
    check_integers(left, right)
    need = 0
    if isinstance(left, int) and isinstance(right, int):
        if symbol == "**" and left.bit_length() * right > BITS:
            raise LimitError(f"a template with an integer of more than {BITS} bits")
    elif symbol == "*":
        for items, number in ((left, right), (right, left)):
            if isinstance(items, (str, list, tuple)) and isinstance(number, int):
                need = repeated(items) * max(number, 0)
    elif symbol == "%" and isinstance(left, str):
        check_printf(left, right)
    elif symbol == "+":
        need = shallow(left) + shallow(right)
    budget().need(need * max(growth(left), growth(right)))
    return calls.counted(_OPERATIONS[symbol](left, right))


def _text(x):
    """Returns a value of the output as text."""
    if type(x) in (str, marks.MarkedText):
        return x
    budget().need(measured(x)[0])
    return calls.counted(str(x))


@pass_context
def _tick(context, size):
    """Counts one iteration of a loop."""
    budget().spend(size)
    return True


@pass_context
def _checked(context, x):
    return checked(x)


@pass_context
def _made(context, x):
    """Counts a new list, tuple or dict."""
    return calls.counted(x)


@pass_context
def _sliced(context, x, start, stop, step):
    budget().need(shallow(x))
    return calls.counted(x[start:stop:step])


@pass_context
def _joined(context, items):
    budget().need(measured(items)[0])
    return calls.counted(marks.joined([str(item) for item in items]))


def _filter(node, name, *args):
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _is_constant(node):
    """Returns whether a node is a constant, or a short list or tuple of constants."""
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return len(node.items) <= _FEW and all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)


class _Limiter(NodeTransformer):
    """Inserts checks where Jinja calls no method of its environment."""

    def visit_For(self, node):
        node = self.generic_visit(node)
        # Outputs and their buffer take memory per iteration.
        size = nodes.Const(64 + 16 * sum(1 for _ in node.find_all(nodes.Output)), lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(_filter(size, "_tick"), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_filter(size, "_tick"), node.test, lineno=node.lineno)
        return node

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        # A comparison with a constant takes no time, except for `in`.
        if all(operand.op in ("eq", "ne") for operand in node.ops) and any(map(_is_constant, sides)):
            return node
        node.expr = self._checked(node.expr)
        for operand in node.ops:
            operand.expr = self._checked(operand.expr)
        return node

    def visit_Getitem(self, node):
        node = self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        none = nodes.Const(None, lineno=node.lineno)
        return _filter(node.node, "_sliced", *(x or none for x in (node.arg.start, node.arg.stop, node.arg.step)))

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_Pair(self, node):
        node = self.generic_visit(node)
        node.key = self._checked(node.key)
        return node

    def visit_List(self, node):
        node = self.generic_visit(node)
        return node if _is_constant(node) else _filter(node, "_made")

    def visit_Tuple(self, node):
        return self.visit_List(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Dict(self, node):
        return _filter(self.generic_visit(node), "_made")

    def visit_ScopedEvalContextModifier(self, node):
        raise TemplateError("the tag autoescape, which chat templates may not use")

    def _checked(self, node):
        return node if _is_constant(node) else _filter(node, "_checked")
