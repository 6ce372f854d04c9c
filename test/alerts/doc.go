// Package alerts tests the alerts and the dashboard of the chart with Prometheus'
// own parser and engine: each alert fires on series where it must, and not on
// series where it must not. That the metrics in them exist is a test of package
// agent.
//
// It is a module of its own because Prometheus' dependencies and the agent's
// cannot be had in one.
package alerts
