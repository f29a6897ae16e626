"""For tests: a clock that is moved by hand, a store with faults, and the conformance suite of every port."""
