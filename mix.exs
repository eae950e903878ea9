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
      name: "Bombus",
      description: "Quantized language models with LoRA adapters, in any Elixir app",
      package: package(),
      docs: docs(),
      deps: deps()
    ]
  end

  # For `Bombus.Text`, `Bombus.Tensor` and their like; all else works without. Without Hex (this
  # project's own builds) Mix could not even look at them.
  defp deps do
    if Code.ensure_loaded?(Hex),
      do: [
        {:nx, "~> 0.10", optional: true},
        {:telemetry, "~> 1.0", optional: true},
        {:ex_doc, "~> 0.40", only: :dev, runtime: false}
      ],
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
      links: %{
        "Changelog" => "https://hexdocs.pm/bombus/changelog.html",
        "MLX" => "https://github.com/ml-explore/mlx"
      },
      files:
        ~w(lib native/Cargo.toml native/Cargo.lock native/bombus native/bombus_nif
                native/jinja native/xtask priv/models priv/python guides config mix.exs README.md CHANGELOG.md LICENSE)
    ]
  end

  # For `mix docs`, where there is ex_doc.
  defp docs do
    [
      main: "readme",
      source_ref: "v#{@version}",
      extra_section: "GUIDES",
      extras: [
        "README.md",
        "guides/serving.md",
        "guides/structured_output.md",
        "guides/fine_tuning.md",
        "guides/bumblebee.md",
        {"bench/README.md", filename: "measurements", title: "Measurements"},
        {"scripts/demo_model/README.md", filename: "demo_model", title: "The demo model"},
        "CHANGELOG.md"
      ],
      groups_for_extras: [
        Guides: ~r"^guides/",
        About: ["bench/README.md", "scripts/demo_model/README.md", "CHANGELOG.md"]
      ],
      groups_for_modules: [
        Loading: [Bombus, Bombus.Model, Bombus.Tokenizer, Bombus.Adapter, Bombus.Hub],
        "Generating text": [Bombus.Serving, Bombus.Text, Bombus.Telemetry],
        Training: [Bombus.Training.LoRA],
        Tensors: [Bombus.Tensor, Bombus.Safetensors, Bombus.Quantization],
        Exceptions: [Bombus.Error]
      ]
    ]
  end
end
