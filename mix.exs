defmodule Bombus.MixProject do
  use Mix.Project

  @version "0.1.0"

  def project do
    [
      app: :bombus,
      version: @version,
      elixir: "~> 1.18",
      # The native compiler is in this package: it can only be found behind the others.
      compilers: Mix.compilers() ++ [:bombus_native],
      elixirc_paths: elixirc_paths(Mix.env()),
      start_permanent: Mix.env() == :prod,
      description: "4-bit MLX language models with LoRA adapters, in any Elixir app",
      package: package(),
      deps: deps()
    ]
  end

  # For `Bombus.Text`, `Bombus.Tensor` and their like; all else works without. Without Hex (this
  # project's own builds) Mix could not even look at them.
  defp deps do
    if Code.ensure_loaded?(Hex),
      do: [{:nx, "~> 0.10", optional: true}, {:telemetry, "~> 1.0", optional: true}],
      else: []
  end

  def application do
    # Where the application has these, they start first.
    [
      extra_applications: [:logger, telemetry: :optional, nx: :optional],
      mod: {Bombus.Application, []}
    ]
  end

  defp elixirc_paths(:test), do: ["lib", "test/support"]
  defp elixirc_paths(_env), do: ["lib"]

  defp package do
    [
      licenses: ["Apache-2.0"],
      files:
        ~w(lib native/Cargo.toml native/Cargo.lock native/bombus native/bombus_nif
                native/jinja native/xtask priv/models priv/python guides config mix.exs README.md CHANGELOG.md LICENSE)
    ]
  end
end
